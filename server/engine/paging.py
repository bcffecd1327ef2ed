"""Where the rows of one step find their keys: in the pages of the cache, read in place by the kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deltaserve.kernels.cpu.decoder import CACHE_CODECS
from deltaserve.kernels.cpu.operations import CpuBackend
from deltaserve.kernels.dispatch import Backend
from deltaserve.kernels.paged import Pages

FEW_ROWS, FEW_PAIRS = 64, 1 << 17
"""Up to so many rows of a step, whether they decode or begin, or so many pairs of a row and one of its request's keys,
rows are each attended to on their own, and all layers computed in one call; rows of a long prompt share what they read.
"""

Stored = Sequence[tuple[Tensor, Tensor]]
"""Keys and values ``[token rows, key heads, width]`` of each layer."""


def reader(backend: Backend, model_on: torch.device, dtype: torch.dtype) -> CpuBackend | None:
    """The backend, if it can read such a cache in place."""
    can = isinstance(backend, CpuBackend) and model_on.type == "cpu" and dtype in CACHE_CODECS
    return backend if can else None  # type: ignore[return-value]  # just seen


@dataclass(frozen=True, slots=True, eq=False)
class Beginning:
    """A request with several queries; ``before`` of its keys are earlier; ``stored`` int64: where all its keys are."""

    queries: slice
    before: int
    stored: Tensor


class Paged:
    """The requests of one step, in flat order: how many queries each has, the last of its keys, and its pages.

    ``tables`` has the token row at which each page of a request begins, at least as many as its keys take; a page holds
    ``tokens``.
    """

    def __init__(
        self,
        backend: CpuBackend,
        cache: Stored,
        tables: Sequence[Tensor],
        query_lengths: Sequence[int],
        key_lengths: Sequence[int],
        tokens: int,
    ) -> None:
        self.cache = cache
        self.requests = tables, query_lengths, key_lengths, tokens
        self._backend, self._tables, self._tokens = backend, tables, tokens
        self._queries, self._keys = torch.tensor(query_lengths), torch.tensor(key_lengths)
        self._lengths = query_lengths
        pairs = sum(queries * keys for queries, keys in zip(query_lengths, key_lengths, strict=True))
        self.is_row_by_row = sum(query_lengths) <= FEW_ROWS or pairs <= FEW_PAIRS

    @cached_property
    def rows(self) -> Pages:
        """The keys of each row: those of its request, up to its own."""
        return self._pages(torch.arange(len(self._lengths)))

    @cached_property
    def _singles(self) -> tuple[Tensor, Pages]:
        """Requests with one query: their rows, and their keys."""
        requests = (self._queries == 1).nonzero().flatten()
        return self._ends[requests] - 1, self._pages(requests)

    @cached_property
    def _beginnings(self) -> list[Beginning]:
        found = []
        for i, length in enumerate(self._lengths):
            if length > 1:
                keys, end = int(self._keys[i]), int(self._ends[i])
                rows = (self._tables[i][:, None] + torch.arange(self._tokens)).flatten()[:keys]
                found.append(Beginning(slice(end - length, end), keys - length, rows))
        return found

    @cached_property
    def _ends(self) -> Tensor:
        return self._queries.cumsum(0)

    @cached_property
    def _starts(self) -> tuple[Tensor, Tensor]:
        """All pages, one request's after the other's, and where each request's begin."""
        counts = torch.tensor([len(table) for table in self._tables])
        return torch.cat(list(self._tables)), counts.cumsum(0) - counts

    def _pages(self, requests: Tensor) -> Pages:
        """A row for each query of these requests; the keys of a request's first are those before it and its own."""
        starts, first = self._starts
        queries, keys = self._queries[requests], self._keys[requests]
        earlier = (keys - queries).repeat_interleave(queries)
        own = torch.arange(len(earlier)) - (queries.cumsum(0) - queries).repeat_interleave(queries)
        return Pages(starts, first[requests].repeat_interleave(queries), earlier + own + 1, self._tokens)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, stored: tuple[Tensor, Tensor], scale: float) -> Tensor:
        """``[rows, heads, width]`` for ``query`` ``[1, heads, rows, width]``.

        ``key`` and ``value`` ``[1, key heads, rows, width]`` are the rows' own; ``stored``, the layer's cache, has all.
        """
        if self.is_row_by_row:
            return self._backend.attend(query[0].transpose(0, 1), *stored, self.rows, scale)
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
        rows, pages = self._singles
        if len(rows):
            out[rows] = self._backend.attend(query[0, :, rows].transpose(0, 1), *stored, pages, scale)
        for one in self._beginnings:
            own = slice(None), slice(None), one.queries
            k, v = (key[own], value[own]) if one.before == 0 else (_gathered(cache, one.stored) for cache in stored)
            out[one.queries] = _causal(query[own], k, v, one.before, scale)
        return out


def _gathered(cache: Tensor, rows: Tensor) -> Tensor:
    return cache.index_select(0, rows).transpose(0, 1)[None]


def _causal(query: Tensor, key: Tensor, value: Tensor, before: int, scale: float) -> Tensor:
    """``[queries, heads, width]``: each query sees the ``before`` keys, and those of the queries up to its own."""
    queries, keys = query.shape[2], key.shape[2]
    result = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=torch.ones(queries, keys, dtype=torch.bool).tril(before) if before else None,
        is_causal=before == 0,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result[0].transpose(0, 1)
