"""What is compressed: a full fine-tune or a LoRA adapter, seen as the changes that it makes to its base."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from deltaserve.delta_store.architecture import Architecture
from deltaserve.delta_store.checkpoint import Checkpoint, open_checkpoint
from deltaserve.delta_store.delta import TensorDelta, deltas, head_is_tied, is_whole
from deltaserve.delta_store.lora import Adapter, is_adapter, open_adapter

Factors = tuple[Tensor, Tensor]
"""``a`` ``[r, in]`` and ``b`` ``[out, r]`` in float32, whose product ``b @ a`` is the delta."""


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One tensor that the fine-tune changes. ``read`` gives its delta; ``factors`` is there where that is a product.

    ``is_whole``: the base has no such tensor, as with the head of an encoder's fine-tune.
    """

    name: str
    transposed: bool
    read: Callable[[], TensorDelta]
    factors: Factors | None = None
    is_whole: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class FineTune:
    """``changes`` starts anew at each call and reads one tensor at a time; ``read`` gives one of ``names``, its
    parameters.

    ``architecture`` is its own: an encoder's fine-tune may have another head than its base, and other names then.

    ``tied``: embedding and head are one matrix. ``tied_head``: and the head follows the embedding's delta in a variant.
    ``vocabulary`` counts the embedding's rows, ``tensor_count`` and ``parameters`` the whole model.
    """

    folder: Path
    architecture: Architecture
    is_adapter: bool
    tied: bool
    tied_head: bool
    vocabulary: int
    dtype: torch.dtype
    tensor_count: int
    parameters: int
    changes: Callable[[], Iterator[Change]]
    names: tuple[str, ...]
    read: Callable[[str], Tensor]


def open_fine_tune(path: str | Path, base: Checkpoint) -> FineTune:
    """Open a checkpoint or an adapter's folder; raises what ``open_checkpoint`` and ``open_adapter`` raise."""
    if is_adapter(path):
        return _of_adapter(Path(path).expanduser(), open_adapter(path, base), base)
    fine = open_checkpoint(path)
    deltas(base, fine)  # refuses at once what does not line up
    return FineTune(
        folder=fine.folder,
        architecture=fine.architecture,
        is_adapter=False,
        tied=fine.tied,
        tied_head=head_is_tied(base, fine),
        vocabulary=fine.shape(fine.architecture.embedding)[0],
        dtype=fine.dtype(fine.architecture.embedding),
        tensor_count=len(fine.names),
        parameters=sum(prod(fine.shape(name)) for name in fine.names),
        changes=lambda: (_change(delta, base) for delta in deltas(base, fine)),
        names=fine.names,
        read=fine.read,
    )


def _change(delta: TensorDelta, base: Checkpoint) -> Change:
    whole = is_whole(base, delta.name, tuple(delta.raw[1].shape))
    return Change(delta.name, delta.transposed, lambda: delta, is_whole=whole)


def _of_adapter(folder: Path, adapter: Adapter, base: Checkpoint) -> FineTune:
    names = base.names if adapter.tied_head or not base.tied else (*base.names, base.architecture.head or "")
    shapes = {name: base.shape(base.held_as(name)) for name in names}
    shapes |= {delta.name: tuple(delta.raw[1].shape) for delta in adapter.dense}
    return FineTune(
        folder=folder,
        architecture=base.architecture,
        is_adapter=True,
        tied=adapter.tied_head,
        tied_head=adapter.tied_head,
        vocabulary=shapes[base.architecture.embedding][0],
        dtype=base.dtype(base.architecture.embedding),
        tensor_count=len(shapes),
        parameters=sum(map(prod, shapes.values())),
        changes=lambda: _adapter_changes(adapter, base),
        names=names,
        read=_adapter_reader(adapter, base),
    )


def _adapter_changes(adapter: Adapter, base: Checkpoint) -> Iterator[Change]:
    transposed = base.architecture.transposed
    for name, factors in adapter.low_rank.items():
        yield Change(name, name in transposed, lambda name=name: _multiplied(adapter, base, name), factors)  # type: ignore[misc]
    for delta in adapter.dense:
        yield Change(delta.name, delta.transposed, lambda delta=delta: delta)  # type: ignore[misc]


def _adapter_reader(adapter: Adapter, base: Checkpoint) -> Callable[[str], Tensor]:
    whole = {delta.name: delta.raw[1] for delta in adapter.dense}

    def read(name: str) -> Tensor:
        if name in adapter.low_rank:
            return _multiplied(adapter, base, name).fine
        return whole[name] if name in whole else base.read(base.held_as(name))

    return read


def _multiplied(adapter: Adapter, base: Checkpoint, name: str) -> TensorDelta:
    a, b = adapter.low_rank[name]
    weight = base.read(base.held_as(name))
    transposed = name in base.architecture.transposed
    product = b @ a
    return TensorDelta(name, (weight, weight.float() + (product.T if transposed else product)), transposed)
