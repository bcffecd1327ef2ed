"""Pages of a cache for tests of attention."""

import torch

from deltaserve.kernels.paged import Pages


def random_pages(rng: torch.Generator, lengths: list[int], tokens: int) -> tuple[Pages, int]:
    """Pages of requests, scattered over a cache with some spare, and the token rows that the cache has."""
    counts = [-(-length // tokens) for length in lengths]
    total = sum(counts)
    starts = torch.randperm(total + 3, generator=rng)[:total] * tokens
    first = torch.tensor([0, *counts]).cumsum(0)[:-1]
    return Pages(starts, first, torch.tensor(lengths), tokens), (total + 3) * tokens
