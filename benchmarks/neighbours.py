"""Neighbouring systems' encodings of a linear weight's delta, written from their papers' formulas, to compare with.

Each gives the decoded delta and its bits as that system would store them. What is left out is said at each; embeddings
and norms are not theirs here: a comparison gives all systems the same ones.
"""

from collections.abc import Callable
from functools import partial
from math import log2

import torch
from torch import Tensor

Encode = Callable[[Tensor, torch.Generator], tuple[Tensor, float]]
"""From a delta ``[out, in]`` to what is decoded from it, and its size in bits."""

INT4_GROUP = 128


def bitdelta(delta: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Signs, and the least-squares scale of the whole weight, mean |delta| (arXiv:2402.10193), not distilled."""
    scale = delta.abs().mean()
    return torch.where(delta >= 0, scale, -scale), delta.numel() + 16


def truncated_svd(delta: Tensor, generator: torch.Generator, rank: int) -> tuple[Tensor, float]:
    """The nearest weight of this rank, its factors in 16 bits."""
    q = min(rank + 8, *delta.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(delta, q=q, niter=4)
    a, b = (v[:, :rank] * s[:rank]).bfloat16().float(), u[:, :rank].bfloat16().float()
    return b @ a.T, 16 * rank * sum(delta.shape)


def half_int4(delta: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Two of every four values by magnitude, in 4 bits with a 16-bit scale a group, as in DeltaZip (arXiv:2312.05215).

    Without its compensation of errors by calibration. 2 bits of index a kept value.
    """
    fours = delta.reshape(-1, 4)
    kept = fours.abs().argsort(dim=1, descending=True, stable=True)[:, :2]
    values = fours.gather(1, kept).reshape(delta.shape[0], -1)
    width = values.shape[1]
    group = INT4_GROUP if width % INT4_GROUP == 0 else width
    groups = values.reshape(-1, group)
    scale = (groups.abs().amax(1, keepdim=True) / 7).clamp_min(1e-12).bfloat16().float()
    rounded = (groups / scale).round().clamp(-8, 7) * scale
    decoded = torch.zeros_like(fours).scatter_(1, kept, rounded.reshape(-1, 2)).reshape(delta.shape)
    return decoded, (4 + 2) * values.numel() + 16 * len(groups)


def ultradelta(delta: Tensor, generator: torch.Generator, drop: float) -> tuple[Tensor, float]:
    """4 bits for all first, then of each of the 16 values exactly p are dropped (arXiv:2505.13563), the rest / (1 - p).

    Without its factor that compares the variants of a set, and with one p for all layers. Positions are counted at
    their entropy.
    """
    low, high = delta.aminmax()
    codes = ((delta - low) / (high - low).clamp_min(1e-12) * 15).round()
    # A random key within each value: its first ones in that order stay.
    keys = torch.rand(delta.shape, generator=generator).flatten()
    order = (codes.flatten() * 2 + keys).argsort()  # grouped by value, random within
    counts = torch.bincount(codes.flatten().long(), minlength=16)
    starts = counts.cumsum(0) - counts
    within = torch.arange(len(order)) - starts.repeat_interleave(counts)
    stays = within < (counts * (1 - drop)).round().repeat_interleave(counts)
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[order] = stays
    values = codes * (high - low) / 15 + low
    decoded = torch.where(mask.view(delta.shape), values / (1 - drop), 0)
    density = mask.double().mean().item()
    return decoded, delta.numel() * (4 * density + _entropy(density)) + 32


def dare_with_indices(delta: Tensor, generator: torch.Generator, drop: float) -> tuple[Tensor, float]:
    """A fair coin for each value (arXiv:2311.03099), survivors / (1 - p) in 16 bits, positions at their entropy."""
    mask = torch.rand(delta.shape, generator=generator) >= drop
    density = mask.double().mean().item()
    decoded = torch.where(mask, (delta / (1 - drop)).bfloat16().float(), 0)
    return decoded, delta.numel() * (16 * density + _entropy(density))


def _entropy(share: float) -> float:
    """Bits a position: which of the two it is."""
    return 0.0 if share in (0, 1) else -share * log2(share) - (1 - share) * log2(1 - share)


NEIGHBOURS: dict[str, Encode] = {
    "BitDelta": bitdelta,
    "SVD r=8": partial(truncated_svd, rank=8),
    "2:4 int4": half_int4,
    "UltraDelta p=0.99": partial(ultradelta, drop=0.99),
    "DARE p=0.99 indices": partial(dare_with_indices, drop=0.99),
    "UltraDelta p=0.97": partial(ultradelta, drop=0.97),
    "DARE p=0.9 indices": partial(dare_with_indices, drop=0.9),
    "SVD r=2": partial(truncated_svd, rank=2),
    "SVD r=32": partial(truncated_svd, rank=32),
    "DARE p=0.97 indices": partial(dare_with_indices, drop=0.97),
    "UltraDelta p=0.9": partial(ultradelta, drop=0.9),
}
"""At their own operating points."""

KINDS = ("BitDelta", "SVD", "2:4 int4", "UltraDelta", "DARE")
