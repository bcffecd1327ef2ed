"""Which columns a sparse part keeps and what multiplies its survivors, from its specification."""

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from deltaserve.delta_store.codec.masks import (
    check_kept,
    check_weights,
    uniform_columns,
    uniform_factors,
    weighted_columns,
)
from deltaserve.delta_store.codec.philox import key_for
from deltaserve.delta_store.codec.specs import SparseSpec
from deltaserve.delta_store.errors import BaseMismatch, ProfileMissing
from deltaserve.kernels.cpu import columns as compiled
from deltaserve.kernels.cpu import library


class ColumnWeights(Protocol):
    """What weighted drop needs of an activation profile (``delta_store/profile.py``)."""

    @property
    def digest(self) -> str: ...
    def __contains__(self, name: str) -> bool: ...
    def weights(self, name: str) -> Tensor: ...


def seeded_columns(spec: SparseSpec, name: str, profile: ColumnWeights | None) -> tuple[Tensor, Tensor]:
    """Columns int32 ``[blocks, kept]`` and factors float32 ``[in]`` of a seeded mask for parameter ``name``.

    Raises ProfileMissing or BaseMismatch where a weighted mask has no profile that fits.
    """
    assert spec.seed is not None
    width = spec.shape[1]
    check_kept(spec.kept, width)
    if spec.mask == "uniform":
        factors = uniform_factors(width, spec.kept).double() * spec.kept / width
        return _uniform(spec.seed, name, spec.blocks, width, spec.kept), (factors / spec.divisor).float()
    columns, factors = _weighted(_weights(name, width, profile), spec.seed, name, spec.blocks, spec.kept)
    return columns, factors if spec.divisor == 1 else (factors.double() / spec.divisor).float()


def _uniform(seed: int, name: str, blocks: int, width: int, kept: int) -> Tensor:
    if not _is_compiled():
        return uniform_columns(seed, name, blocks, width, kept)
    return compiled.uniform_columns(key_for(seed, name), blocks, width, kept)


def _weighted(weights: Tensor, seed: int, name: str, blocks: int, kept: int) -> tuple[Tensor, Tensor]:
    if not _is_compiled():
        return weighted_columns(weights, seed, name, blocks, kept)
    try:
        return compiled.weighted_columns(weights, key_for(seed, name), blocks, kept)
    except ValueError:
        check_weights(weights.numpy(), kept)  # says what is wrong with them
        raise


@cache
def _is_compiled() -> bool:
    """Whether the library was built; ``masks.py`` draws the same without, in some hundred times the time."""
    try:
        library.library()
    except RuntimeError:
        return False
    return True


def explicit_factors(spec: SparseSpec) -> Tensor:
    """float32 ``[in]``: ``1 / divisor``."""
    return torch.full((spec.shape[1],), 1 / spec.divisor)


def _weights(name: str, width: int, profile: ColumnWeights | None) -> Tensor:
    if profile is None:
        raise ProfileMissing(f"{name} was pruned by weighted drop, which needs the base's activation profile", "")
    if name not in profile:
        raise BaseMismatch(f"The activation profile {profile.digest} has no weights for {name}; use the base's own")
    weights = profile.weights(name)
    if len(weights) != width:
        raise BaseMismatch(f"The activation profile has {len(weights)} weights for {name}, the delta {width} columns")
    return weights
