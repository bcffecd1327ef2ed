"""Attention over a paged cache: where each row's keys are, and in plain torch what the kernels compute."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """For each row of a batch, its keys: the first ``lengths[row]`` tokens of the pages from ``first[row]`` on.

    ``starts`` int64: the token row of the cache at which each page begins; a page has ``tokens`` of them. ``first`` and
    ``lengths`` int64 ``[rows]``, lengths at least 1.
    """

    starts: Tensor
    first: Tensor
    lengths: Tensor
    tokens: int

    def of(self, row: int) -> Tensor:
        """int64: the token rows of one row's keys."""
        first, length = int(self.first[row]), int(self.lengths[row])
        pages = self.starts[first : first - -length // self.tokens]
        return (pages[:, None] + torch.arange(self.tokens)).flatten()[:length]


def attend(query: Tensor, keys: Tensor, values: Tensor, pages: Pages, scale: float) -> Tensor:
    """``softmax(query . keys * scale) @ values`` of each row, in float32; heads share keys in equal consecutive groups.

    ``query`` ``[rows, heads, width]``; ``keys`` and ``values`` ``[token rows, key heads, width]``. Returns the shape
    and dtype of ``query``.
    """
    out = torch.empty_like(query)
    for row in range(len(query)):
        at = pages.of(row)
        k, v = (cache[at].float().transpose(0, 1) for cache in (keys, values))  # [key heads, n, width]
        q = query[row].float().view(k.shape[0], -1, query.shape[2])
        out[row] = ((q @ k.transpose(1, 2) * scale).softmax(-1) @ v).view(query.shape[1:]).to(query.dtype)
    return out
