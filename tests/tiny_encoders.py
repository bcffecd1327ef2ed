"""Random encoders of a few kilobytes, of several families, and fine-tunes of them with heads of their own."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tiny_models import fine_tuned, tiny_tokenizer
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedModel,
    RobertaConfig,
)

from deltaserve.kernels.codes import float_codes
from deltaserve.kernels.parts import Delta, Dense, LowRank, Sparse
from deltaserve.kernels.reference import unpack

VOCABULARY = 64
LABELS = {0: "bad", 1: "good", 2: "neither"}

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, Any] = {
    "bert": BertConfig(**_SIZES),
    "roberta": RobertaConfig(**_SIZES | {"pad_token_id": 1}),
    "distilbert": DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=40,
        initializer_range=0.2,
    ),
    "mpnet": MPNetConfig(**_SIZES | {"pad_token_id": 1}),
    "albert": AlbertConfig(**_SIZES, embedding_size=16),
    "modernbert": ModernBertConfig(
        **_SIZES, local_attention=8, global_attn_every_n_layers=2, cls_token_id=2, sep_token_id=3, bos_token_id=2,
        eos_token_id=3, classifier_pooling="mean",
    ),
}  # fmt: skip


def tiny_encoder(family: str = "bert", seed: int = 0, labels: Mapping[int, str] | None = None) -> PreTrainedModel:
    """The headless model of a family, or with ``labels`` one that classifies; float32, in eval mode."""
    torch.manual_seed(seed)
    config = deepcopy(FAMILIES[family])
    if labels is None:
        return AutoModel.from_config(config).eval()
    config.id2label = dict(labels)
    config.label2id = {label: number for number, label in labels.items()}
    return AutoModelForSequenceClassification.from_config(config).eval()


def classifier_of(base: PreTrainedModel, seed: int = 1, scale: float = 0.05, labels: Any = None) -> PreTrainedModel:
    """A fine-tune of the body of ``base``, every parameter of which changes, under a new head."""
    labels = labels or LABELS
    model = tiny_encoder(base.config.model_type, seed, labels)
    body = model.base_model
    body.load_state_dict(base.base_model.state_dict(), strict=False)
    return fine_tuned(model, seed, scale)


def save_encoder(model: PreTrainedModel, folder: Path) -> Path:
    """Write an ordinary checkpoint folder with a tokenizer: one token a character."""
    model.save_pretrained(folder)
    tiny_tokenizer(VOCABULARY).save_pretrained(folder)
    return folder


def random_deltas(
    fine: PreTrainedModel, base: PreTrainedModel, seed: int = 0
) -> tuple[dict[str, Delta], PreTrainedModel]:
    """Deltas of every kind by the base's names, heads whole, and the model that base and deltas make together."""
    rng = torch.Generator().manual_seed(seed)
    merged = deepcopy(fine)
    deltas = {}
    prefix = "" if merged.base_model is merged else f"{merged.base_model_prefix}."
    own, above = dict(base.base_model.named_parameters()), dict(base.named_parameters())
    ours = "" if base.base_model is base else f"{base.base_model_prefix}."
    for number, (name, parameter) in enumerate(merged.named_parameters()):
        inside = name.removeprefix(prefix) if name.startswith(prefix) else None
        if inside in own:
            delta = _random_delta(rng, tuple(parameter.shape), number)
            deltas[ours + inside] = delta
            parameter.data = own[inside].detach() + unpack(delta)
        else:
            has = name in above and above[name].shape == parameter.shape
            values = parameter.detach() - above[name].detach() if has else parameter.detach()
            deltas[name] = Delta(tuple(values.shape), (Dense(tuple(values.shape), float_codes(values)),))
    return deltas, merged.eval()


def _random_delta(rng: torch.Generator, shape: tuple[int, ...], number: int) -> Delta:
    def noise(*size: int) -> Any:
        return float_codes(0.1 * torch.randn(size, generator=rng))

    if len(shape) == 1 or number % 3 == 0:
        return Delta(shape, (Dense(shape, noise(*shape)),))
    if number % 3 == 1:
        return Delta(shape, (LowRank(shape, noise(2, shape[1]), noise(shape[0], 2)),))
    blocks, kept = -(-shape[0] // 4), max(1, shape[1] // 4)
    columns = torch.stack([torch.randperm(shape[1], generator=rng)[:kept].sort().values for _ in range(blocks)]).int()
    return Delta(shape, (Sparse(shape, columns, noise(blocks, kept, 4), torch.full((shape[1],), 2.0)),))


def random_texts(count: int, seed: int, longest: int = 30) -> list[list[int]]:
    """Texts of 1 to ``longest`` tokens, none of which pads."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=rng).tolist()
    return [torch.randint(2, VOCABULARY, (length,), generator=rng).tolist() for length in lengths]


@torch.no_grad()
def embedded_alone(
    model: PreTrainedModel, text: Sequence[int], *, cls: bool = False, normalised: bool = False
) -> Tensor:
    """What transformers itself gives for one text."""
    hidden = model.base_model(torch.tensor([list(text)]))[0][0]
    vector = hidden[0] if cls else hidden.mean(0)
    return torch.nn.functional.normalize(vector, dim=0) if normalised else vector


@torch.no_grad()
def classified_alone(model: PreTrainedModel, text: Sequence[int]) -> Tensor:
    """The same of a model that classifies: probabilities."""
    return model(torch.tensor([list(text)])).logits[0].softmax(-1)
