"""Which product computes the base's rows: the kernels' own, or one of torch's where that is measured to be faster."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

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


def packed(x: Tensor, weight: Weight, y: Tensor) -> None:
    """oneDNN's, with the copy of the weight that ``with_copy`` made."""
    y.copy_(torch.ops.mkldnn._linear_pointwise(x, weight.packed, weight.bias, "none", [], ""))


def with_copy(weight: Weight) -> Weight:
    """The weight with a second copy in oneDNN's layout."""
    return replace(weight, packed=torch.ops.mkldnn._reorder_linear_weight(weight.values))


PRODUCTS: tuple[Product, ...] = (plain, transposed)

Choice = tuple[tuple[int, Product | None], ...]
"""By ascending rows; None stands for the kernels' own."""


def choose(weights: Sequence[Weight], own: Callable[[Weight], Product], *, copies: bool = False) -> Choice:
    """The fastest for each number of rows, measured on the largest of ``weights``; ``own`` prepares the kernels'.

    ``copies``: ``packed`` may be chosen too, which needs every weight twice.
    """
    weight = max(weights, key=lambda weight: weight.values.nbytes)
    if weight.scales is not None:
        return ((ROWS[-1], None),)  # torch would have to spell the weight out for every batch
    sample = Weight(weight.values[: max(1, MOST_BYTES // weight.values[0].nbytes)])
    caches = torch.empty(CACHE_BYTES, dtype=torch.uint8)
    products = PRODUCTS
    if copies and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        sample, products = with_copy(sample), (*PRODUCTS, packed)
    prepared = own(sample)
    return tuple((rows, _fastest(rows, sample, prepared, products, caches)) for rows in ROWS)


def product_for(rows: int, choice: Choice) -> Product | None:
    """What the choice says for a batch of so many rows."""
    for most, product in choice:
        if rows <= most:
            return product
    return choice[-1][1]


def _fastest(rows: int, weight: Weight, own: Product, others: Sequence[Product], caches: Tensor) -> Product | None:
    out, width = weight.values.shape
    x, y = torch.ones(rows, width, dtype=weight.values.dtype), torch.empty(rows, out, dtype=weight.values.dtype)

    def seconds(product: Product) -> float:
        caches.fill_(1)
        start = time.perf_counter()
        product(x, weight, y)
        return time.perf_counter() - start

    times = {product: min(seconds(product) for _ in range(REPEATS)) for product in (own, *others)}
    best = min(others, key=lambda product: times[product])
    return best if times[best] < ADVANTAGE * times[own] else None
