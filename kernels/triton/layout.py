"""Lay a delta out for the GPU kernels: all its bytes in one piece of device memory, and a descriptor that points there.

Codes stay packed. Parts are lowered to the three kinds of ``descriptor.py``: rows with a mean row become lines plus a
low-rank part of rank one, whose ``b`` is 1 where the mean row counts. Groups of values that share a scale are cut to
powers of two, by repeating scales, so that a kernel shifts instead of dividing.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltaserve.kernels.codes import BITS, FLOAT_CODECS, float_codes
from deltaserve.kernels.parts import Codes, Delta, Dense, LowRank, Part, Rows, Sparse
from deltaserve.kernels.triton import descriptor as at

BLOCKS = (1, 4, 8, 16, 32, 64)
WIDEST_COLUMN = 1 << 16
MOST_VALUES = 1 << 31
ALIGNMENT = 16

Fields = dict[int, int | Tensor]
"""Numbers of a descriptor's row; a tensor stands for its address."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A delta in the kernels' layout. A vector ``[n]`` is laid out as ``[1, n]``."""

    shape: tuple[int, ...]
    descriptor: Tensor
    """int64 ``[1 + MAX_PARTS, FIELDS]``, on the device."""
    rank: int
    """Of all its low-rank parts together."""
    rows_alone: Tensor | None
    """The rows it changes, int64, where it changes no others."""
    sparse_alone: tuple[int, ...] | None
    """``(blocks, K, V)`` where it is one sparse part."""
    memory: Tensor

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes


def prepare(delta: Delta, device: torch.device) -> Prepared:
    """Lay out a delta whose tensors are on the CPU, on ``device``.

    Raises ValueError for what the kernels cannot run or what would lead them out of their memory: another block size,
    columns or ids out of range or order, codes or scales that are too few.
    """
    rows, width = delta.shape if len(delta.shape) == 2 else (1, delta.shape[0])
    lowered: list[Fields] = []
    rank = 0
    for part in delta.parts:
        for fields in _lower(part, rows, width):
            if fields[at.KIND.value] == at.LOW_RANK.value:
                fields[at.FIRST_RANK.value] = rank
                rank += int(fields[at.KEPT.value])
            lowered.append(fields)
    if len(lowered) > at.MAX_PARTS.value:
        raise ValueError(f"A delta of {len(lowered)} parts; the GPU kernels run at most {at.MAX_PARTS.value}")
    own: Fields = {at.PARTS.value: len(lowered), at.ROWS.value: rows, at.WIDTH.value: width}
    descriptor, memory = _place([own, *lowered], device)
    alone = delta.parts[0] if len(delta.parts) == 1 else None
    return Prepared(
        delta.shape,
        descriptor,
        rank,
        alone.ids.to(device) if isinstance(alone, Rows) and alone.mean is None else None,
        alone.values.shape if isinstance(alone, Sparse) else None,
        memory,
    )


def _lower(part: Part, rows: int, width: int) -> list[Fields]:
    match part:
        case Sparse():
            return [_sparse(part, rows, width)]
        case LowRank():
            return [_low_rank(part.a, part.b)]
        case Dense():
            return [{at.KIND.value: at.LINES.value, **_codes(at.CODES.value, part.values, rows * width)}]
        case Rows():
            return _rows(part, rows, width)


def _sparse(part: Sparse, rows: int, width: int) -> Fields:
    blocks, kept, block = part.values.shape
    _check_sparse(part, rows, width)
    narrow = width <= WIDEST_COLUMN
    return {
        at.KIND.value: at.SPARSE.value,
        at.KEPT.value: kept,
        at.LOG_BLOCK.value: block.bit_length() - 1,
        at.COLUMNS.value + at.DATA.value: part.columns.to(torch.uint16) if narrow else part.columns.int(),
        at.COLUMNS.value + at.LOG_BITS.value: 4 if narrow else 5,
        at.FACTORS.value: part.factors.float(),
        **_codes(at.CODES.value, part.values, blocks * kept * block),
    }


def _check_sparse(part: Sparse, rows: int, width: int) -> None:
    blocks, kept, block = part.values.shape
    columns = part.columns
    if block not in BLOCKS:
        raise ValueError(f"Blocks of {block} rows; the GPU kernels run {', '.join(map(str, BLOCKS))}")
    if columns.shape != (blocks, kept) or blocks != -(-rows // block) or part.factors.shape != (width,):
        raise ValueError(
            f"A sparse part of {rows} x {width} has columns {tuple(columns.shape)}, values {part.values.shape} "
            f"and factors {tuple(part.factors.shape)}"
        )
    if blocks * kept * block >= MOST_VALUES:
        raise ValueError(f"{blocks * kept * block} values in one sparse part; the GPU kernels count to {MOST_VALUES}")
    if kept and (int(columns.min()) < 0 or int(columns.max()) >= width):
        raise ValueError(
            f"Columns of a sparse part reach from {columns.min()} to {columns.max()}, its width is {width}"
        )
    if not bool((columns.diff(dim=1) > 0).all()):
        raise ValueError("Columns of a sparse part must ascend within each block")


def _low_rank(a: Codes, b: Codes) -> Fields:
    return {
        at.KIND.value: at.LOW_RANK.value,
        at.KEPT.value: a.shape[0],
        **_codes(at.CODES.value, a, prod(a.shape)),
        **_codes(at.SECOND_CODES.value, b, prod(b.shape)),
    }


def _rows(part: Rows, rows: int, width: int) -> list[Fields]:
    ids = part.ids.long()
    if len(ids) and (int(ids[0]) < 0 or int(ids[-1]) >= rows or not bool((ids.diff() > 0).all())):
        raise ValueError(f"Row ids must ascend within 0 .. {rows - 1}")
    index = torch.full((rows,), -1, dtype=torch.int32)
    index[ids] = torch.arange(len(ids), dtype=torch.int32)
    lines: Fields = {
        at.KIND.value: at.LINES.value,
        at.INDEX.value: index,
        **_codes(at.CODES.value, part.values, len(ids) * width),
    }
    if part.mean is None:
        return [lines]
    others = (index < 0) & (torch.arange(rows) < part.mean_rows)
    return [lines, _low_rank(float_codes(part.mean[None]), float_codes(others[:, None], "bf16"))]


def _codes(first: int, codes: Codes, count: int) -> Fields:
    """The fields from ``first`` on, for ``count`` values."""
    bits = BITS[codes.codec]
    scaled = codes.codec not in FLOAT_CODECS
    if codes.data.nbytes * 8 < count * bits or (scaled and codes.scales.numel() * codes.group < count):
        raise ValueError(
            f"{count} values of codec {codes.codec} in groups of {codes.group} do not fit into "
            f"{codes.data.nbytes} bytes and {codes.scales.numel()} scales"
        )
    numbers: Fields = {first + at.DATA.value: codes.data, first + at.LOG_BITS.value: bits.bit_length() - 1}
    if not scaled:
        return numbers
    group = codes.group & -codes.group  # the greatest power of two in it
    half = 1.0 if codes.codec == "sign" else 0.5  # of a step: codes are doubled, to make offsets whole numbers
    numbers[first + at.SCALES.value] = (codes.scales * half).bfloat16().repeat_interleave(codes.group // group)
    numbers[first + at.LOG_GROUP.value] = group.bit_length() - 1
    numbers[first + at.TWICE_OFFSET.value] = {"int8": 256, "int4": 16, "int2": 3, "sign": 1}[codes.codec]
    if codes.codec == "int8":
        numbers[first + at.DATA.value] = codes.data ^ 0x80  # two's complement to an offset of 128
    return numbers


def _place(rows: list[Fields], device: torch.device) -> tuple[Tensor, Tensor]:
    """The descriptor, and the memory that its addresses point into."""
    descriptor = torch.zeros(1 + at.MAX_PARTS.value, at.FIELDS.value, dtype=torch.int64)
    pieces: list[Tensor] = []
    addressed: list[tuple[int, int, int]] = []
    size = 0
    for i, fields in enumerate(rows):
        for field, value in fields.items():
            if isinstance(value, Tensor):
                data = value.contiguous().flatten().view(torch.uint8)
                pieces.append(pad(data, (0, -len(data) % ALIGNMENT)))
                addressed.append((i, field, size))
                size += len(pieces[-1])
            else:
                descriptor[i, field] = value
    memory = torch.cat(pieces).to(device) if pieces else torch.empty(0, dtype=torch.uint8, device=device)
    for i, field, offset in addressed:
        descriptor[i, field] = memory.data_ptr() + offset
    return descriptor.to(device), memory
