"""Deltas of linear layers: ``y[rows] += x[rows] @ delta.T``, each tile of rows with the delta of its own slot.

A program has one tile of rows and ``OUTS`` outputs. It learns from tables on the device whose rows they are and where
that delta lies, so that one captured launch serves any set of variants. Tiles that are nobody's end at once.

Sizes are reasoned, not tuned: no GPU was at hand. 16 x 16 is the smallest tile of tensor cores, and 16 outputs are one
block of V = 16. Steps of 32 and 512 products in flight (four for each thread of Triton's usual four warps) take 168
registers a thread where twice as much takes all 255, says the compiler: so three programs share a processor.
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# ruff: noqa: N803, N806

import triton
import triton.language as tl

from deltaserve.kernels.triton.decode import coded, number, packed, value
from deltaserve.kernels.triton.descriptor import (
    BIAS,
    BIAS_ROWS,
    CODES,
    COLUMNS,
    FACTORS,
    FIELDS,
    FIRST_RANK,
    INDEX,
    KEPT,
    KIND,
    LINES,
    LOG_BLOCK,
    LOW_RANK,
    MAX_PARTS,
    PARTS,
    ROWS,
    SECOND_CODES,
    SPARSE,
    WIDTH,
)

FULL = tl.constexpr(16)
"""Rows of a full tile, which tensor cores multiply."""
FEW = tl.constexpr(4)
"""Rows of a smaller tile, multiplied by plain FMA; a single row has kernel code of its own."""
OUTS = tl.constexpr(16)
DOT_STEP = tl.constexpr(32)
IN_FLIGHT = tl.constexpr(512)


@triton.jit
def load_tile(tiles, rows):
    """First row, number of rows and slot of this program's tile; no rows outside of the batch, whatever it says."""
    tile = tiles + 3 * tl.program_id(0)
    first, count, slot = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    count = tl.where(first < 0, 0, tl.minimum(count, rows - first))
    return first, count, slot


@triton.jit
def _sparse_dot(part, inputs, stride, valid_row, out, valid_out, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """float32 ``[FULL, OUTS]``: ``sum_k x[t, columns[b, k]] * values[b, k, v]`` where all outputs are of one block."""
    kept = tl.load(part + KEPT).to(tl.int32)
    log_block = tl.load(part + LOG_BLOCK).to(tl.int32)
    columns, codes = packed(part + COLUMNS), coded(part + CODES)
    factors = tl.load(part + FACTORS).to(tl.pointer_type(tl.float32))
    first = (tl.min(out, 0) >> log_block) * kept
    inside = out & ((1 << log_block) - 1)
    total = tl.zeros([FULL, OUTS], tl.float32)
    for start in range(0, kept, DOT_STEP):
        k = start + tl.arange(0, DOT_STEP)
        valid = k < kept
        column = number(columns, first + k, valid).to(tl.int32)
        place = ((first + k) << log_block)[:, None] + inside[None, :]
        values = value(codes, place, valid[:, None] & valid_out[None, :])
        values *= tl.load(factors + column, valid, 0)[:, None]
        x = tl.load(inputs[:, None] + column[None, :] * stride, valid_row[:, None] & valid[None, :], 0)
        total += tl.dot(x.to(DOT_TYPE), values.to(DOT_TYPE), input_precision=PRECISION)
    return total


@triton.jit
def _sparse_sum(part, inputs, stride, valid_row, out, valid_out, TILE: tl.constexpr):
    """The same for any block size and few rows: ``[TILE, OUTS]``."""
    kept = tl.load(part + KEPT).to(tl.int32)
    log_block = tl.load(part + LOG_BLOCK).to(tl.int32)
    columns, codes = packed(part + COLUMNS), coded(part + CODES)
    factors = tl.load(part + FACTORS).to(tl.pointer_type(tl.float32))
    first = (out >> log_block) * kept
    inside = out & ((1 << log_block) - 1)
    STEP: tl.constexpr = IN_FLIGHT // (TILE * OUTS)
    sums = tl.zeros([TILE, STEP, OUTS], tl.float32)
    for start in range(0, kept, STEP):
        k = start + tl.arange(0, STEP)
        valid = (k < kept)[:, None] & valid_out[None, :]
        place = first[None, :] + k[:, None]
        column = number(columns, place, valid).to(tl.int32)
        values = value(codes, (place << log_block) + inside[None, :], valid) * tl.load(factors + column, valid, 0)
        x = tl.load(
            inputs[:, None, None] + column[None, :, :] * stride, valid_row[:, None, None] & valid[None, :, :], 0
        )
        sums += x.to(tl.float32) * values[None, :, :]
    return tl.sum(sums, 1)


@triton.jit
def _sparse(
    part, inputs, stride, valid_row, out, valid_out, TILE: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr
):
    if TILE == FULL:
        if tl.load(part + LOG_BLOCK) >= 4:
            total = _sparse_dot(part, inputs, stride, valid_row, out, valid_out, DOT_TYPE, PRECISION)
        else:
            total = _sparse_sum(part, inputs, stride, valid_row, out, valid_out, TILE)
    else:
        total = _sparse_sum(part, inputs, stride, valid_row, out, valid_out, TILE)
    return total


@triton.jit
def _lines(
    codes, width, inputs, stride, valid_row, line, valid_line,
    TILE: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 ``[TILE, OUTS]``: ``sum_k x[t, k] * values[line, k]``, ``values`` ``[lines, width]``."""
    first = line.to(tl.int64) * width
    STEP: tl.constexpr = DOT_STEP if TILE == FULL else IN_FLIGHT // (TILE * OUTS)
    total = tl.zeros([TILE, OUTS], tl.float32)
    sums = tl.zeros([1 if TILE == FULL else TILE, STEP, OUTS], tl.float32)
    for start in range(0, width, STEP):
        k = start + tl.arange(0, STEP)
        valid = k < width
        values = value(codes, k[:, None] + first[None, :], valid[:, None] & valid_line[None, :])
        x = tl.load(inputs[:, None] + k[None, :] * stride, valid_row[:, None] & valid[None, :], 0)
        if TILE == FULL:
            total += tl.dot(x.to(DOT_TYPE), values.to(DOT_TYPE), input_precision=PRECISION)
        else:
            sums += x.to(tl.float32)[:, :, None] * values[None, :, :]
    return total if TILE == FULL else tl.sum(sums, 1)


@triton.jit
def _add(
    y, x, hidden, delta, first, count, outs, panel,
    TILE: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of at most ``TILE`` rows: read ``y``, add every part in float32, round once."""
    valid_row = tl.arange(0, TILE) < count
    row = (first + tl.arange(0, TILE)).to(tl.int64)
    out = panel * OUTS + tl.arange(0, OUTS)
    valid_out = out < outs
    width = tl.load(delta + WIDTH).to(tl.int32)
    inputs, stride = x[0] + row * x[1], x[2]
    target = y[0] + row[:, None] * y[1] + out[None, :] * y[2]
    valid = valid_row[:, None] & valid_out[None, :]
    total = tl.load(target, valid, 0).to(tl.float32)
    bias = tl.load(delta + BIAS).to(tl.pointer_type(tl.float32))
    total += tl.load(bias + out, out < tl.load(delta + BIAS_ROWS), 0)[None, :]
    for i in range(tl.load(delta + PARTS).to(tl.int32)):
        part = delta + (1 + i) * FIELDS
        kind = tl.load(part + KIND)
        if kind == SPARSE:
            total += _sparse(part, inputs, stride, valid_row, out, valid_out, TILE, DOT_TYPE, PRECISION)
        elif kind == LINES:
            line, index = out, tl.load(part + INDEX)
            if index != 0:
                line = tl.load(index.to(tl.pointer_type(tl.int32)) + out, valid_out, -1)
            codes = coded(part + CODES)
            present = valid_out & (line >= 0)
            total += _lines(codes, width, inputs, stride, valid_row, line, present, TILE, DOT_TYPE, PRECISION)
        else:
            rank = tl.load(part + KEPT).to(tl.int32)
            codes = coded(part + SECOND_CODES)
            projected = hidden[0] + row * hidden[1] + tl.load(part + FIRST_RANK)
            total += _lines(codes, rank, projected, 1, valid_row, out, valid_out, TILE, tl.float32, PRECISION)
    tl.store(target, total.to(y[0].dtype.element_ty), valid)


@triton.jit(do_not_specialize=["hidden_row", "rows", "outs", "slots"])  # or a batch of one row would compile anew
def delta_linear(
    y, y_row, y_column, x, x_row, x_column, hidden, hidden_row, rows, outs, tiles, table, slots,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``y`` ``[rows, outs]``; ``tiles`` int32 ``[n, 3]``: first row, number of rows, slot; ``table`` of ``Slots``.

    ``hidden`` float32 ``[rows, hidden_row]`` holds what ``project`` left. Grid: (tiles, panels of outputs).
    """
    panel = tl.program_id(1)
    first, count, slot = load_tile(tiles, rows)
    if (slot >= 0) & (slot < slots):
        delta = table + slot.to(tl.int64) * (1 + MAX_PARTS) * FIELDS
        outs = tl.minimum(outs, tl.load(delta + ROWS).to(tl.int32))
        if panel * OUTS < outs:
            target, inputs, projected = (y, y_row, y_column), (x, x_row, x_column), (hidden, hidden_row)
            if count > FEW:
                _add(target, inputs, projected, delta, first, count, outs, panel, FULL, DOT_TYPE, PRECISION)
            elif count > 1:
                _add(target, inputs, projected, delta, first, count, outs, panel, FEW, DOT_TYPE, PRECISION)
            else:
                _add(target, inputs, projected, delta, first, count, outs, panel, 1, DOT_TYPE, PRECISION)


@triton.jit(do_not_specialize=["hidden_row", "rows", "slots"])
def project(
    hidden, hidden_row, x, x_row, x_column, rows, tiles, table, slots,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``hidden[t, FIRST_RANK + j] = x[t] @ a[j]`` for the low-rank parts of each row's own delta, in float32.

    Grid: (tiles, panels of ranks). Also a single row takes a whole tile of tensor cores: reading ``a`` is the cost.
    """
    first, count, slot = load_tile(tiles, rows)
    if (slot >= 0) & (slot < slots):
        delta = table + slot.to(tl.int64) * (1 + MAX_PARTS) * FIELDS
        width = tl.load(delta + WIDTH).to(tl.int32)
        valid_row = tl.arange(0, FULL) < count
        row = (first + tl.arange(0, FULL)).to(tl.int64)
        column = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
        for i in range(tl.load(delta + PARTS).to(tl.int32)):
            part = delta + (1 + i) * FIELDS
            if tl.load(part + KIND) == LOW_RANK:
                line = column - tl.load(part + FIRST_RANK).to(tl.int32)
                present = (line >= 0) & (line < tl.load(part + KEPT).to(tl.int32)) & (column < hidden_row)
                codes, inputs = coded(part + CODES), x + row * x_row
                total = _lines(codes, width, inputs, x_column, valid_row, line, present, FULL, DOT_TYPE, PRECISION)
                target = hidden + row[:, None] * hidden_row + column[None, :]
                tl.store(target, total, valid_row[:, None] & present[None, :])
