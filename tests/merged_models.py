"""A base with a fine-tune's deltas added, as an ordinary model: what serving has to equal."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.delta import TensorDelta, deltas, head_is_tied
from deltaserve.delta_store.lora import Adapter

TOKENS = torch.tensor([[1, 5, 9, 23, 40, 63, 2, 17], [3, 3, 60, 11, 31, 7, 50, 20]])


def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens).logits


def merged(base: Checkpoint, fine: Checkpoint) -> PreTrainedModel:
    """Base plus deltas, in float32."""
    return _model(base, _added(base, deltas(base, fine)), head_is_tied(base, fine))


def adapted(base: Checkpoint, adapter: Adapter) -> PreTrainedModel:
    """Base plus everything that an adapter changes, in float32."""
    values = _added(base, adapter.dense)
    for name, (a, b) in adapter.low_rank.items():
        delta = (b @ a).T if name in base.architecture.transposed else b @ a
        values[name] = base.read(base.held_as(name)).float() + delta
    return _model(base, values, adapter.tied_head)


def _added(base: Checkpoint, changes: Iterable[TensorDelta]) -> dict[str, Tensor]:
    """The changed tensors, each computed as base plus difference; added rows are the fine-tune's."""
    values = {}
    for change in changes:
        value = change.fine.clone()
        rows = len(change.base)
        value[:rows] = change.base + (change.fine[:rows] - change.base)
        values[change.name] = value
    return values


def _model(base: Checkpoint, changed: dict[str, Tensor], tied_head: bool) -> PreTrainedModel:
    values = {name: base.read(name).float() for name in base.names}
    head = base.architecture.head
    if head is not None and not tied_head:
        values[head] = base.read(base.held_as(head)).float()
    values |= changed
    config = AutoConfig.from_pretrained(base.folder)
    config.tie_word_embeddings = tied_head
    config.vocab_size = len(values[base.architecture.embedding])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected
    assert set(missing) == ({head} if tied_head else set())
    return model
