"""Structural drop: whole rows, columns or attention heads of a weight's delta are kept, at random and unbiased."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from deltaserve.delta_store.codec import encode
from deltaserve.delta_store.codec.masks import uniform_columns, uniform_factors
from deltaserve.delta_store.codec.specs import RowsSpec
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.pruning.weights import BaseFacts, Weight
from deltaserve.delta_store.pruning.whole import Encoded

BLOCK = 64
"""Rows that share their columns in a kernel; here all rows do, so the largest is the fastest."""

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""Attention's last layer, by its usual names: there a head is columns, elsewhere in attention rows."""


def structural(weight: Weight, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    """Keep whole rows, columns or attention heads at random; survivors are divided by their probability.

    ``heads`` keeps the same heads in the layers of one attention that have as many; outside attention it keeps rows.
    """
    axis, size = _unit(weight, options, facts)
    count = weight.matrix.shape[axis] // size
    kept = round((1 - options.drop) * count)
    if not kept:
        yield weight.whole(options)
        return
    drawn_for = weight.name if size == 1 else weight.name.rsplit(".", 2)[0]
    units = uniform_columns(options.seed, drawn_for, 1, count, kept)[0].long()
    factors = uniform_factors(count, kept)[units].repeat_interleave(size)
    lines = (units[:, None] * size + torch.arange(size)).flatten()
    yield _rows(weight, options, lines, factors) if axis == 0 else _columns(weight, options, lines, factors)


def _unit(weight: Weight, options: Options, facts: BaseFacts) -> tuple[int, int]:
    """Along which axis units lie, and of how many lines each consists."""
    if options.unit != "heads":
        return UNIT_AXES[options.unit], 1
    path = weight.name.split(".")
    in_attention = any("attn" in word or "attention" in word for word in path[:-2])
    axis = int(in_attention and path[-2] in OUTPUT_PROJECTIONS)
    fits = in_attention and facts.head_size and weight.matrix.shape[axis] % facts.head_size == 0
    return (axis, facts.head_size) if fits and facts.head_size else (0, 1)


UNIT_AXES = {"rows": 0, "columns": 1}


def _rows(weight: Weight, options: Options, ids: Tensor, factors: Tensor) -> Encoded:
    out, width = weight.matrix.shape
    spec = RowsSpec(
        shape=(out, width),
        transposed=weight.transposed,
        base_rows=out,
        count=len(ids),
        codec=options.codec,
        has_mean=False,
    )
    return spec, encode.rows(weight.matrix[ids] * factors[:, None], ids, None, spec)


def _columns(weight: Weight, options: Options, columns: Tensor, factors: Tensor) -> Encoded:
    spec = weight.sparse_spec("explicit", len(columns), replace(options, block=BLOCK))
    scaled = weight.matrix.index_copy(1, columns, weight.matrix[:, columns] * factors)
    return spec, encode.explicit_sparse(scaled, spec, columns.expand(spec.blocks, -1))
