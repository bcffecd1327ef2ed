"""Seeded masks: which columns a block of rows keeps, drawn in integer arithmetic so that every machine draws the same.

Neither draw is stored: the seed, the tensor's name and (for weighted drop) the base's profile give it back. Each comes
with *factors*, the inverse of every column's inclusion probability, which make the pruned delta unbiased
(Horvitz and Thompson, 1952).
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltaserve.delta_store.codec.philox import key_for, philox
from deltaserve.delta_store.errors import OptionError

UNIFORM, WEIGHTED = 0, 1
"""The third word of a draw's counter: no two kinds of draw share random numbers."""

PRODUCT_LIMIT = 1 << 62
"""Total weight times kept columns stays below this, so that no product or sum leaves int64."""

DRAWS_AT_ONCE = 1 << 16
"""Bounds the memory of a draw: about 100 bytes for each."""


def uniform_columns(seed: int, name: str, blocks: int, width: int, kept: int) -> Tensor:
    """int32 ``[blocks, kept]``, ascending: one column from each of ``kept`` strata.

    Column ``i`` lies in ``[i * width // kept, (i + 1) * width // kept)``, each with the same probability, within
    ``stratum / 2**32``.
    """
    check_kept(kept, width)
    key = key_for(seed, name)
    edges = _edges(width, kept)
    columns = np.empty((blocks, kept), np.int32)
    for start, stop in _runs(blocks, kept):
        words = _words(key, start, stop, UNIFORM, kept).astype(np.int64)
        columns[start:stop] = edges[:-1] + (words * np.diff(edges) >> 32)
    return torch.from_numpy(columns)


def uniform_factors(width: int, kept: int) -> Tensor:
    """float32 ``[width]``: the size of each column's stratum; sizes differ by one unless ``kept`` divides ``width``."""
    check_kept(kept, width)
    sizes = np.diff(_edges(width, kept))
    return torch.from_numpy(np.repeat(sizes, sizes).astype(np.float32))


def weighted_columns(weights: Tensor, seed: int, name: str, blocks: int, kept: int) -> tuple[Tensor, Tensor]:
    """Columns drawn in proportion to ``weights``: int32 ``[blocks, kept]`` ascending, and factors float32 ``[width]``.

    ``weights`` int64 ``[width]``, each at least 1. The heaviest columns, whose probability would reach 1, are kept
    in every block; their factor is 1. The others, of total weight T, are drawn by systematic sampling: laid end to
    end on a line of length T, those are kept on which the points ``(r + i * T) / rest`` fall, with one random ``r``
    in ``[0, T)`` a block. Column ``j`` is hit by exactly ``rest * w[j]`` of the T values of r, and its factor is
    ``T / (rest * w[j])``. (The modulo that makes r favours none by more than ``T / 2**64``.)

    Raises OptionError where ``sum(weights) * kept`` reaches 2**62, or a weight is below 1.
    """
    w = weights.numpy().astype(np.int64, copy=False)
    check_kept(kept, len(w))
    check_weights(w, kept)
    certain, drawn = _split(w, kept)
    rest = kept - len(certain)
    ends = np.cumsum(w[drawn])
    key = key_for(seed, name)
    columns = np.empty((blocks, kept), np.int32)
    for start, stop in _runs(blocks, kept):
        columns[start:stop, : len(certain)] = certain
        if rest:
            points = _points(key, start, stop, rest, int(ends[-1]))
            columns[start:stop, len(certain) :] = drawn[np.searchsorted(ends, points, side="right")]
    columns.sort(axis=1)
    return torch.from_numpy(columns), _weighted_factors(w, drawn, rest)


def check_kept(kept: int, width: int) -> None:
    """Raises OptionError unless ``1 <= kept <= width``."""
    if not 1 <= kept <= width:
        raise OptionError(f"{kept} columns cannot be kept of {width}; keep at least 1 and at most {width}")


def _edges(width: int, kept: int) -> NDArray[np.int64]:
    return np.arange(kept + 1, dtype=np.int64) * width // kept


def _runs(blocks: int, kept: int) -> Iterator[tuple[int, int]]:
    step = max(1, DRAWS_AT_ONCE // kept)
    for start in range(0, blocks, step):
        yield start, min(start + step, blocks)


def _words(key: tuple[int, int], start: int, stop: int, kind: int, count: int) -> NDArray[np.uint32]:
    """uint32 ``[stop - start, count]``; for number ``i`` of block ``b``: word ``i % 4`` at ``(i // 4, b, kind, 0)``."""
    counters = np.zeros((stop - start, -(-count // 4), 4), np.uint32)
    counters[..., 0] = np.arange(counters.shape[1])
    counters[..., 1] = np.arange(start, stop)[:, None]
    counters[..., 2] = kind
    return philox(counters, key).reshape(stop - start, -1)[:, :count]


def check_weights(w: NDArray[np.int64], kept: int) -> None:
    """Raises OptionError where ``sum(w) * kept`` reaches 2**62, or a weight is below 1."""
    if w.min() < 1:
        raise OptionError(f"A column's weight is {w.min()}; weights start at 1")
    if (total := sum(map(int, w))) * kept >= PRODUCT_LIMIT:
        raise OptionError(
            f"Weights of total {total} with {kept} kept columns exceed 64-bit arithmetic; scale them down"
        )


def _split(w: NDArray[np.int64], kept: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Columns that are always kept, and the others, each ascending.

    Taking them heaviest first: a column is certain if ``w * rest >= T``, where T is the weight and ``rest`` the number
    of columns not yet settled. The first one that is not ends the search, as every later one is lighter.
    """
    order = np.argsort(-w, kind="stable")[:kept]
    heaviest = w[order]
    left = w.sum() - (np.cumsum(heaviest) - heaviest)
    settled = heaviest * (kept - np.arange(kept)) >= left
    count = kept if settled.all() else int(settled.argmin())
    is_certain = np.zeros(len(w), bool)
    is_certain[order[:count]] = True
    return np.flatnonzero(is_certain), np.flatnonzero(~is_certain)


def _points(key: tuple[int, int], start: int, stop: int, rest: int, total: int) -> NDArray[np.int64]:
    """int64 ``[stop - start, rest]``: ``(r + i * total) // rest``."""
    words = _words(key, start, stop, WEIGHTED, 2).astype(np.uint64)
    offsets = ((words[:, 0] << np.uint64(32) | words[:, 1]) % np.uint64(total)).astype(np.int64)
    return (offsets[:, None] + np.arange(rest, dtype=np.int64) * total) // rest


def _weighted_factors(w: NDArray[np.int64], drawn: NDArray[np.int64], rest: int) -> Tensor:
    factors = np.ones(len(w), np.float64)
    if rest:
        factors[drawn] = w[drawn].sum() / (rest * w[drawn])
    return torch.from_numpy(factors.astype(np.float32))
