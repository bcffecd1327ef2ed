"""The delta of a fine-tune: base and fine-tune paired tensor by tensor, after a check that they line up.

An encoder's fine-tune may have another head than its base. What the base lacks of it has no delta: it counts whole.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaserve.delta_store.bits import same_bits
from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.errors import CheckpointError, UnsupportedCheckpoint

Pairs = dict[str, tuple[str | None, str]]
"""By the base's name for it, which of its tensors (None: it lacks it) and which of the fine-tune's make a parameter."""

HARMLESS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_pooling",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "max_position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "tie_word_embeddings",
        "transformers_version",
        "use_cache",
        "vocab_size",
    }
)
"""Settings that a variant may have otherwise than its base, because the layers compute the same with them.
Vocabulary and tying are looked at in the tensors themselves."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorDelta:
    """One tensor that the fine-tune changes: ``raw`` is (the base's, the fine-tune's), each in its own dtype.

    Both are as stored: [out, in] for a linear weight, [in, out] where ``transposed`` (GPT-2's Conv1D). Embedding and
    head may have more rows in the fine-tune, and of what the base lacks it has no row. Where a tied base meets a
    fine-tune with a head of its own, the base's half of that head is its embedding.
    """

    name: str
    raw: tuple[Tensor, Tensor]
    transposed: bool = False

    @property
    def base(self) -> Tensor:
        """float32, the base's shape."""
        return self.raw[0].float()

    @property
    def fine(self) -> Tensor:
        """float32, the fine-tune's shape: as many rows as the base's or more."""
        return self.raw[1].float()


def deltas(base: Checkpoint, fine: Checkpoint) -> Iterator[TensorDelta]:
    """Every tensor that differs, sorted by the base's name for it, read when it is asked for.

    Before any tensor is read it raises UnsupportedCheckpoint where architecture or configuration differ, and
    CheckpointError where a shape does not fit; while reading, CheckpointError for values that are not finite.
    """
    _check_same_architecture(base, fine)
    pairs = _pairs(base, fine)
    for name, (base_name, fine_name) in pairs.items():
        if base_name is not None:
            check_shapes(name, base.shape(base_name), fine.shape(fine_name), base)
    return _differing(base, fine, pairs)


def head_is_tied(base: Checkpoint, fine: Checkpoint) -> bool:
    """Whether the head follows the embedding's delta: both checkpoints have one matrix for the two.

    Where only the fine-tune ties them, the base's head gets a delta of its own that leads to the same values.
    """
    return base.tied and fine.tied


def is_whole(base: Checkpoint, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a variant's parameter has no delta: the base lacks it, or has it for a head of other labels."""
    ours = base.architecture
    if not ours.is_encoder or base.held_as(name) not in base.names:
        return ours.is_encoder
    return not name.startswith(ours.body) and name != ours.head and base.shape(name) != shape


def _differing(base: Checkpoint, fine: Checkpoint, pairs: Pairs) -> Iterator[TensorDelta]:
    for name, (base_name, fine_name) in pairs.items():
        theirs = fine.read(fine_name)
        ours = theirs[:0] if base_name is None else base.read(base_name)
        delta = TensorDelta(name, (ours, theirs), name in base.architecture.transposed)
        if not same_bits(*delta.raw):
            check_finite(delta)
            yield delta


def _pairs(base: Checkpoint, fine: Checkpoint) -> Pairs:
    theirs = {fine.architecture.name_in(base.architecture, name): name for name in fine.names}
    if base.architecture.name == fine.architecture.name:
        theirs |= {name: fine.held_as(name) for name in base.names}
    return {
        name: (None if is_whole(base, name, fine.shape(theirs[name])) else base.held_as(name), theirs[name])
        for name in sorted(theirs)
    }


def _check_same_architecture(base: Checkpoint, fine: Checkpoint) -> None:
    ours_is, theirs_is = base.architecture, fine.architecture
    only_heads_differ = ours_is.is_encoder and theirs_is.is_encoder and type(ours_is.config) is type(theirs_is.config)
    if ours_is.name != theirs_is.name and not only_heads_differ:
        raise UnsupportedCheckpoint(
            f"The base is a {ours_is.name}, the fine-tune a {theirs_is.name}: a delta needs two of one architecture"
        )
    ours, theirs = _settings(ours_is.config), _settings(theirs_is.config)
    differing = sorted(key for key in ours.keys() | theirs.keys() if not _agree(ours.get(key), theirs.get(key)))
    if differing:
        listed = ", ".join(
            f"{key} ({ours.get(key)} in the base, {theirs.get(key)} in the fine-tune)" for key in differing
        )
        raise UnsupportedCheckpoint(f"Base and fine-tune compute differently; their config.json differ in: {listed}")


def disagreeing(config: Any, told: Mapping[str, Any]) -> list[str]:
    """Names of the settings that matter to the layers in which ``told``, the content of a config.json, differs."""
    return [key for key, value in _settings(config).items() if key in told and not _agree(value, told[key])]


def _settings(config: Any) -> dict[str, Any]:
    """What the configuration class itself knows, defaults filled in; what trainers add beside it has no effect."""
    known = type(config)().to_dict().keys()
    return {key: value for key, value in config.to_dict().items() if key in known and _matters(key)}


def _matters(key: str) -> bool:
    return key not in HARMLESS and "dropout" not in key and not key.endswith("_pdrop")


def _agree(one: Any, other: Any) -> bool:
    """Equality of settings; GGUF keeps numbers in float32, so 1e-5 is 9.99999975e-6 there."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = filter(_matters, one.keys() | other.keys())
        return all(_agree(one.get(key), other.get(key)) for key in keys)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def check_shapes(name: str, base_shape: tuple[int, ...], fine_shape: tuple[int, ...], base: Checkpoint) -> None:
    """Raise CheckpointError unless the shapes are equal, or the tensor is an embedding or head that gained rows."""
    may_grow = name in (base.architecture.embedding, base.architecture.head)
    if base_shape == fine_shape:
        return
    if may_grow and base_shape[1:] == fine_shape[1:] and fine_shape[0] > base_shape[0]:
        return
    remedy = "only added rows can be stored, not removed ones" if may_grow else "only embedding and head may grow"
    raise CheckpointError(
        f"{name} has shape {list(base_shape)} in the base and {list(fine_shape)} in the fine-tune: {remedy}"
    )


def check_finite(delta: TensorDelta) -> None:
    """Raise CheckpointError, with the tensor's name, where base or fine-tune has NaN or infinity in it."""
    for who, tensor in zip(("base", "fine-tune"), delta.raw, strict=True):
        # Least and largest tell, NaN included, and take a sixtieth of the time of asking each value.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise CheckpointError(f"{delta.name} of the {who} holds values that are not finite")
