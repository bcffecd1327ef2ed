"""Lay a delta out for the compiled kernels: packed codes stay packed, pointers are taken once.

A line of codes (one block of a sparse part, one row of the others) is padded to whole chunks of 16 values. The structs
of a delta and copies of its tensors lie in the ``Memory`` of its variant: objects would outweigh the numbers, and views
would keep whole files mapped. Three rare cases are stored as float32 rather than make the kernels grow: groups of fewer
than 16 values, inputs too wide for 16-bit columns, groups that end inside a column.
"""

import ctypes
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltaserve.kernels.codes import BITS, FLOAT_CODECS, decode, float_codes, pack_bits, unpack_bits
from deltaserve.kernels.cpu.columns import CHUNK, WIDEST_COLUMN, laid_out
from deltaserve.kernels.cpu.memory import Memory
from deltaserve.kernels.cpu.structs import CODECS, CodesStruct, DeltaStruct, PartStruct
from deltaserve.kernels.parts import Codes, Delta, Dense, LowRank, Part, Rows, Sparse

MAX_PARTS = 8
BLOCKS = (1, 4, 8, 16, 32, 64)
_SPARSE, _LOW_RANK, _DENSE, _ROWS = range(4)


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A delta in the kernels' layout; ``address`` is its struct's. A vector ``[n]`` is laid out as ``[1, n]``.

    ``nbytes`` counts columns, also where they are shared, but no factors: those belong to the base's profile.
    """

    shape: tuple[int, ...]
    nbytes: int
    address: int
    rows_alone: Tensor | None
    """The rows it changes, int64, where it changes no others."""
    kept_alone: int | None
    """K, where it is one sparse part."""
    _memory: Memory

    @property
    def saved_shape(self) -> tuple[int, int] | None:
        """Values that swapping in overwrites, ``(rows, K)``, where it is one sparse part."""
        rows = self.shape[0] if len(self.shape) == 2 else 1
        return None if self.kept_alone is None else (rows, self.kept_alone)


def prepare(delta: Delta, memory: Memory | None = None) -> Prepared:
    """Lay out a delta whose tensors are on the CPU, in its variant's ``memory``: for use once that is settled.

    Raises ValueError for a part that the kernels cannot run: another block size, columns out of range or out of order.
    """
    if memory is None:
        prepared = prepare(delta, own := Memory(chunk=0))
        own.settle()
        return prepared
    rows, width = delta.shape if len(delta.shape) == 2 else (1, delta.shape[0])
    if len(delta.parts) > MAX_PARTS:
        raise ValueError(f"A delta of {len(delta.parts)} parts; the CPU kernels run at most {MAX_PARTS}")
    before = memory.nbytes
    address = memory.take(_HEAD + _EACH * len(delta.parts))
    struct = DeltaStruct.from_address(address)
    struct.rows, struct.width, struct.parts, struct.count = rows, width, address + _HEAD, len(delta.parts)
    struct.cycles = sum(_cycles(part, rows, width) for part in delta.parts)
    for i, part in enumerate(delta.parts):
        _lay_out(part, PartStruct.from_address(address + _HEAD + _EACH * i), rows, width, memory)
    alone = delta.parts[0] if len(delta.parts) == 1 else None
    return Prepared(
        delta.shape,
        memory.nbytes - before,
        address,
        alone.ids if isinstance(alone, Rows) and alone.mean is None else None,
        alone.columns.shape[1] if isinstance(alone, Sparse) else None,
        memory,
    )


_HEAD, _EACH = ctypes.sizeof(DeltaStruct), ctypes.sizeof(PartStruct)


def _lay_out(part: Part, struct: PartStruct, rows: int, width: int, memory: Memory) -> None:
    match part:
        case Sparse():
            _sparse(part, struct, width, memory)
        case LowRank():
            struct.kind, struct.kept = _LOW_RANK, part.b.shape[1]
            struct.a, struct.b = _codes(part.a, width, memory), _columns(part.b, memory)
        case Dense():
            struct.kind, struct.a = _DENSE, _codes(part.values, width, memory)
        case Rows():
            _rows(part, struct, rows, width, memory)


def _sparse(part: Sparse, struct: PartStruct, width: int, memory: Memory) -> None:
    kept, block = part.values.shape[1:]
    if block not in BLOCKS:
        raise ValueError(f"Blocks of {block} rows; the CPU kernels run {', '.join(map(str, BLOCKS))}")
    wide = width > WIDEST_COLUMN
    factors = part.factors.float().numpy()
    even = len(factors) == 0 or bool((factors == factors[0]).all())
    struct.kind, struct.block, struct.wide_columns, struct.kept = _SPARSE, block, wide, kept
    struct.gain = float(factors[0]) if even and len(factors) else 1.0
    struct.factors = None if even else memory.share(factors)
    struct.a = _codes(part.values, kept * block, memory, float32=wide, unit=block)
    memory.columns(ctypes.addressof(struct) + PartStruct.columns.offset, laid_out(part.columns, width))


def _rows(part: Rows, struct: PartStruct, rows: int, width: int, memory: Memory) -> None:
    ids = part.ids.long().contiguous()
    if len(ids) and (int(ids[0]) < 0 or int(ids[-1]) >= rows or not bool((ids.diff() > 0).all())):
        raise ValueError(f"Row ids must ascend within 0 .. {rows - 1}")
    struct.kind, struct.kept, struct.mean_rows = _ROWS, len(ids), part.mean_rows
    struct.ids = memory.copy(ids)
    struct.mean = None if part.mean is None else memory.copy(part.mean.float().contiguous())
    struct.a = _codes(part.values, width, memory)


def _codes(codes: Codes, length: int, memory: Memory, *, float32: bool = False, unit: int = 1) -> CodesStruct:
    """``unit`` values in a row must share a scale, or be cut by groups at chunks."""
    scaled = codes.codec not in FLOAT_CODECS
    fits = codes.group % unit == 0 or codes.group % CHUNK == 0
    if float32 or (scaled and (codes.group < CHUNK or not fits)):
        codes = Codes("float32", codes.shape, decode(codes).flatten(), codes.scales, 1)
        scaled = False
    bits = BITS[codes.codec]
    padded = -(-length // CHUNK) * CHUNK
    data = codes.data.contiguous().view(torch.uint8)
    if padded != length:
        data = _padded(data, prod(codes.shape) // length, length, padded, bits)
    return CodesStruct(
        data=memory.copy(data),
        scales=memory.copy(codes.scales.bfloat16().contiguous()) if scaled else None,
        length=length,
        line_bytes=padded * bits // 8,
        group=codes.group,
        codec=CODECS.index(codes.codec),
    )


def _columns(codes: Codes, memory: Memory) -> CodesStruct:
    """Codes ``[rows, r]`` laid out column after column, with a scale for each row or for a multiple of 16 rows."""
    rows, rank = codes.shape
    scaled = codes.codec not in FLOAT_CODECS
    if scaled and codes.group % rank:  # a row with two scales
        codes, scaled = float_codes(decode(codes)), False
    bits, padded = BITS[codes.codec], -(-rows // CHUNK) * CHUNK
    if bits >= 8:
        values = codes.data.view(torch.int8) if bits == 8 else codes.data
        data = pad(values.view(rows, rank).T, (0, padded - rows)).contiguous()
    else:
        levels = unpack_bits(codes.data, codes.codec, rows * rank).view(rows, rank)
        data = pack_bits(pad(levels.T, (0, padded - rows)).contiguous(), codes.codec)
    group, scales = codes.group // rank, codes.scales.bfloat16()
    if scaled and group % CHUNK:
        group, scales = 1, pad(scales[torch.arange(rows) // group], (0, padded - rows))
    return CodesStruct(
        data=memory.copy(data),
        scales=memory.copy(scales.contiguous()) if scaled else None,
        length=rows,
        line_bytes=padded * bits // 8,
        group=group,
        codec=CODECS.index(codes.codec),
    )


def _padded(data: Tensor, lines: int, length: int, padded: int, bits: int) -> Tensor:
    """Lines of ``length`` values moved to where lines of ``padded`` values begin: whole bytes, zeros between."""
    if bits >= 8:
        size = bits // 8
        return pad(data[: lines * length * size].view(lines, length * size), (0, (padded - length) * size)).flatten()
    shifts = torch.arange(8 // bits, dtype=torch.uint8) * bits
    fields = (data[:, None] >> shifts & (2**bits - 1)).flatten()[: lines * length].view(lines, length)
    fields = pad(fields, (0, padded - length)).view(-1, 8 // bits)
    return (fields << shifts).sum(1, dtype=torch.uint8)


def _cycles(part: Part, rows: int, width: int) -> float:
    """About what one row of a batch costs; only to decide whether threads are worth waking."""
    match part:
        case Sparse():
            blocks, kept, block = part.values.shape
            return blocks * kept * (3 * block / CHUNK if block >= CHUNK else block * 2)
        case LowRank():
            return part.b.shape[1] * (rows + width) / 4
        case Dense():
            return rows * width / 4
        case Rows():
            return len(part.ids) * width / 4
