"""Which product computes the base's rows: the kernels' own, or one of torch's where that is measured to be faster."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltaserve.kernels.weights import Weight

ROWS = (1, 4, 16, 32, 64, 256)
"""Rows of a batch at which products are timed; a batch between two goes by the larger."""
MOST_BYTES = 1 << 26
"""Of a weight, to be timed on."""
CACHE_BYTES = 1 << 26
"""Written before each timing: a layer's weight is in no cache when its turn comes, after all the others."""
REPEATS = 3
ADVANTAGE = 0.9
"""Another product must be this much faster than the kernels' own, which give a row the same result in every batch."""

Product = Callable[[Tensor, Weight, Tensor], None]
"""``(x, weight, y)``: writes ``y = x @ weight.T + bias``."""


def plain(x: Tensor, weight: Weight, y: Tensor) -> None:
    """What ``F.linear`` runs."""
    values = weight.dense().to(x.dtype).T
    if weight.bias is None:
        torch.mm(x, values, out=y)
    else:
        torch.addmm(weight.bias.to(x.dtype), x, values, out=y)


def transposed(x: Tensor, weight: Weight, y: Tensor) -> None:
    """``(weight @ x.T).T``: for some libraries and few rows the better order."""
    y.copy_(torch.mm(weight.dense(), x.T).T)
    if weight.bias is not None:
        y += weight.bias


PRODUCTS: tuple[Product, ...] = (plain, transposed)

Choice = tuple[tuple[int, Product | None], ...]
"""By ascending rows; None stands for the kernels' own."""


def choose(weights: Sequence[Weight], own: Callable[[Weight], Product]) -> Choice:
    """The fastest for each number of rows, measured on the largest of ``weights``; ``own`` prepares the kernels'."""
    weight = max(weights, key=lambda weight: weight.values.nbytes)
    if weight.scales is not None:
        return ((ROWS[-1], None),)  # torch would have to spell the weight out for every batch
    sample = Weight(weight.values[: max(1, MOST_BYTES // weight.values[0].nbytes)])
    caches = torch.empty(CACHE_BYTES, dtype=torch.uint8)
    prepared = own(sample)
    return tuple((rows, _fastest(rows, sample, prepared, caches)) for rows in ROWS)


def _fastest(rows: int, weight: Weight, own: Product, caches: Tensor) -> Product | None:
    out, width = weight.values.shape
    x, y = torch.ones(rows, width, dtype=weight.values.dtype), torch.empty(rows, out, dtype=weight.values.dtype)

    def seconds(product: Product) -> float:
        caches.fill_(1)
        start = time.perf_counter()
        product(x, weight, y)
        return time.perf_counter() - start

    times = {product: min(seconds(product) for _ in range(REPEATS)) for product in (own, *PRODUCTS)}
    best = min(PRODUCTS, key=lambda product: times[product])
    return best if times[best] < ADVANTAGE * times[own] else None
