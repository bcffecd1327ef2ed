"""One weight's delta, encoded by a method and decoded again, for the tests of every method."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve.delta_store.delta import TensorDelta
from deltaserve.delta_store.fine_tune import Change
from deltaserve.delta_store.profile import Profile, encode
from deltaserve.delta_store.pruning.methods import method
from deltaserve.delta_store.pruning.options import Value
from deltaserve.delta_store.pruning.weights import BaseFacts
from deltaserve.delta_store.pruning.whole import Encoded
from deltaserve.kernels.parts import Delta, Part
from deltaserve.kernels.reference import unpack

NAME = "layer.weight"


def tensor_delta(
    *shape: int, added: int = 0, transposed: bool = False, dtype: torch.dtype = torch.float32
) -> TensorDelta:
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(shape, generator=generator).to(dtype)
    fine = torch.randn(shape[0] + added, *shape[1:], generator=generator)
    fine[: shape[0]] = base.float() + 0.05 * fine[: shape[0]]
    return TensorDelta(NAME, (base, fine.to(dtype)), transposed)


def profile(width: int) -> Profile:
    rms = torch.rand(width, generator=torch.Generator().manual_seed(9)) + 0.05
    return Profile("0" * 64, "0" * 64, {"v": encode(rms)}, {NAME: "v"})


def encoded(name: str, delta: TensorDelta, embeddings: Sequence[str] = (), **given: Value) -> list[Encoded]:
    row = method(name)
    width = delta.raw[0].shape[0 if delta.transposed else -1]
    change = Change(NAME, delta.transposed, lambda: delta)
    return list(row.function(change, row.options(given), BaseFacts(profile(width), frozenset(embeddings))))


def decoded(parts: list[Encoded]) -> Tensor:
    found = [part for _, part in parts]
    assert all(isinstance(part, Part) for part in found)
    return unpack(Delta(parts[0][0].shape, tuple(found)))  # type: ignore[arg-type]


def wanted(delta: TensorDelta) -> Tensor:
    return delta.fine - delta.base
