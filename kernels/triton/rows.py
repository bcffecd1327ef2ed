"""Deltas of single rows of a weight: of an embedding's rows in a batch, and swapped into the weight itself.

Sizes are reasoned, not tuned: 16 x 64 numbers are eight for each thread of four warps.
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# ruff: noqa: N803

import triton
import triton.language as tl

from deltaserve.kernels.triton.decode import coded, number, packed, value
from deltaserve.kernels.triton.descriptor import (
    CODES,
    COLUMNS,
    FACTORS,
    FIELDS,
    INDEX,
    KEPT,
    KIND,
    LINES,
    LOG_BLOCK,
    MAX_PARTS,
    PARTS,
    ROWS,
    SECOND_CODES,
    SPARSE,
    WIDTH,
)
from deltaserve.kernels.triton.linear import FULL, load_tile

COLUMNS_EACH = tl.constexpr(64)
"""Columns of a program that adds to rows."""
ROWS_EACH = tl.constexpr(16)
KEPT_EACH = tl.constexpr(64)
"""Rows, and kept columns of each, of a program that swaps."""


@triton.jit
def _sparse(part, id, column, valid):
    """float32 ``[rows, columns]`` of the delta's rows ``id``: each column looks for itself among those kept."""
    kept = tl.load(part + KEPT).to(tl.int32)
    log_block = tl.load(part + LOG_BLOCK).to(tl.int32)
    columns, codes = packed(part + COLUMNS), coded(part + CODES)
    first = (id >> log_block).to(tl.int32) * kept
    low = tl.zeros_like(column) + tl.zeros_like(first)
    high = low + kept
    step = kept
    while step > 0:  # halves the range between low and high
        step = step >> 1
        middle = (low + high) >> 1
        unsettled = valid & (low < high)
        below = unsettled & (number(columns, first + middle, unsettled).to(tl.int32) < column)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    valid = valid & (low < kept)
    valid = valid & (number(columns, first + low, valid).to(tl.int32) == column)
    place = ((first + low) << log_block) + (id & ((1 << log_block) - 1)).to(tl.int32)
    factors = tl.load(part + FACTORS).to(tl.pointer_type(tl.float32))
    return value(codes, place, valid) * tl.load(factors + column, valid, 0)


@triton.jit
def _lines(part, id, column, width, valid):
    """float32 ``[rows, columns]`` of the delta's rows ``id``."""
    line, index = id, tl.load(part + INDEX)
    if index != 0:
        line = tl.load(index.to(tl.pointer_type(tl.int32)) + id).to(tl.int64)
    return value(coded(part + CODES), line * width + column, valid & (line >= 0))


@triton.jit
def _low_rank(part, id, column, width, valid):
    """float32 ``[rows, columns]``: ``b[id] @ a``."""
    a, b = coded(part + CODES), coded(part + SECOND_CODES)
    rank = tl.load(part + KEPT).to(tl.int32)
    total = tl.zeros(valid.shape, tl.float32)
    for j in range(rank):
        total += value(b, id * rank + j, valid) * value(a, j * width + column, valid)
    return total


@triton.jit(do_not_specialize=["rows", "columns", "slots"])
def delta_embedding(y, y_row, y_column, ids, rows, columns, tiles, table, slots):
    """``y[t] += delta[slot of t][ids[t]]``, rounded once; ids outside of the delta's rows add nothing.

    ``y`` ``[rows, columns]``, ``ids`` int64 ``[rows]``, ``tiles`` and ``table`` as ``delta_linear`` has them.
    Grid: (tiles, panels of columns).
    """
    first, count, slot = load_tile(tiles, rows)
    if (slot >= 0) & (slot < slots):
        delta = table + slot.to(tl.int64) * (1 + MAX_PARTS) * FIELDS
        width = tl.load(delta + WIDTH)
        row = (first + tl.arange(0, FULL)).to(tl.int64)[:, None]
        valid_row = (tl.arange(0, FULL) < count)[:, None]
        id = tl.load(ids + row, valid_row, -1)
        valid_row = valid_row & (id >= 0) & (id < tl.load(delta + ROWS))
        column = (tl.program_id(1) * COLUMNS_EACH + tl.arange(0, COLUMNS_EACH))[None, :]
        valid = valid_row & (column < width) & (column < columns)
        id = tl.where(valid_row, id, 0)  # row 0 can always be looked up
        target = y + row * y_row + column * y_column
        total = tl.load(target, valid, 0).to(tl.float32)
        for i in range(tl.load(delta + PARTS).to(tl.int32)):
            part = delta + (1 + i) * FIELDS
            kind = tl.load(part + KIND)
            if kind == SPARSE:
                total += _sparse(part, id, column, valid)
            elif kind == LINES:
                total += _lines(part, id, column, width, valid)
            else:
                total += _low_rank(part, id, column, width, valid)
        tl.store(target, total.to(y.dtype.element_ty), valid)


@triton.jit
def swap_columns(weight, saved, delta, IN: tl.constexpr):
    """Add a delta of one sparse part to ``weight`` ``[rows, width]``, keeping what stood there, or put that back.

    ``saved`` has a place for each value of the part. Grid: (panels of rows, panels of kept columns).
    """
    part = delta + FIELDS
    rows, width = tl.load(delta + ROWS), tl.load(delta + WIDTH)
    kept = tl.load(part + KEPT).to(tl.int32)
    log_block = tl.load(part + LOG_BLOCK).to(tl.int32)
    row = (tl.program_id(0) * ROWS_EACH + tl.arange(0, ROWS_EACH))[None, :]
    k = (tl.program_id(1) * KEPT_EACH + tl.arange(0, KEPT_EACH))[:, None]
    valid = (k < kept) & (row < rows)
    place = (row >> log_block) * kept + k
    column = number(packed(part + COLUMNS), place, valid).to(tl.int32)
    place = (place << log_block) + (row & ((1 << log_block) - 1))
    target = weight + row * width + column
    if IN:
        old = tl.load(target, valid)
        tl.store(saved + place, old, valid)
        factors = tl.load(part + FACTORS).to(tl.pointer_type(tl.float32))
        change = value(coded(part + CODES), place, valid) * tl.load(factors + column, valid, 0)
        tl.store(target, (old.to(tl.float32) + change).to(weight.dtype.element_ty), valid)
    else:
        tl.store(target, tl.load(saved + place, valid), valid)
