"""Which columns a sparse part keeps and what multiplies its survivors, from its specification."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from deltaserve.delta_store.codec.masks import uniform_columns, uniform_factors, weighted_columns
from deltaserve.delta_store.codec.specs import SparseSpec
from deltaserve.delta_store.errors import BaseMismatch, ProfileMissing

MASKS_KEPT = 512
"""Weighted masks remembered, those of one variant and more: the next one pruned with that seed draws nothing."""


class ColumnWeights(Protocol):
    """What weighted drop needs of an activation profile (``delta_store/profile.py``)."""

    @property
    def digest(self) -> str: ...
    def __contains__(self, name: str) -> bool: ...
    def weights(self, name: str) -> Tensor: ...


def seeded_columns(spec: SparseSpec, name: str, profile: ColumnWeights | None) -> tuple[Tensor, Tensor]:
    """Columns int32 ``[blocks, kept]`` and factors float32 ``[in]`` of a seeded mask for parameter ``name``.

    Do not write to them: variants that were pruned with one seed get the same tensors.
    Raises ProfileMissing or BaseMismatch where a weighted mask has no profile that fits.
    """
    assert spec.seed is not None
    width = spec.shape[1]
    if spec.mask == "uniform":
        columns = uniform_columns(spec.seed, name, spec.blocks, width, spec.kept)
        return columns, (uniform_factors(width, spec.kept).double() * spec.kept / width / spec.divisor).float()
    columns, factors = _drawn(
        _Source(profile.digest if profile else None, profile), spec.seed, name, spec.blocks, width, spec.kept
    )
    return columns, (factors.double() / spec.divisor).float()


@dataclass(frozen=True, slots=True)
class _Source:
    """A profile known by its digest."""

    digest: str | None
    profile: ColumnWeights | None = field(compare=False)


@lru_cache(maxsize=MASKS_KEPT)
def _drawn(source: _Source, seed: int, name: str, blocks: int, width: int, kept: int) -> tuple[Tensor, Tensor]:
    return weighted_columns(_weights(name, width, source.profile), seed, name, blocks, kept)


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
