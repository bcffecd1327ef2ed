"""Lay a delta out for the compiled kernels: packed codes stay packed, pointers are taken once.

A line of codes (one block of a sparse part, one row of the others) is padded to whole chunks of 16 values. Where that
changes nothing, the tensors of the delta are used as they are. Three rare cases are stored as float32 rather than make
the kernels grow: groups of fewer than 16 values, inputs too wide for 16-bit columns, groups that end inside a column.
"""

import ctypes
import hashlib
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltaserve.kernels.codes import BITS, FLOAT_CODECS, decode, float_codes, pack_bits, unpack_bits
from deltaserve.kernels.parts import Codes, Delta, Dense, LowRank, Part, Rows, Sparse

CHUNK = 16
MAX_PARTS = 8
BLOCKS = (1, 4, 8, 16, 32, 64)
WIDEST_COLUMN = 1 << 16
CODECS = tuple(BITS)
_SPARSE, _LOW_RANK, _DENSE, _ROWS = range(4)


_FACTORS: WeakValueDictionary[bytes, Tensor] = WeakValueDictionary()


class CodesStruct(Structure):
    """``Codes`` of delta.h."""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("length", c_int64),
        ("line_bytes", c_int64),
        ("group", c_int64),
        ("codec", c_int32),
        ("unused", c_int32),
    )


class PartStruct(Structure):
    """``Part`` of delta.h."""

    _fields_ = (
        ("kind", c_int32),
        ("block", c_int32),
        ("wide_columns", c_int32),
        ("gain", c_float),
        ("kept", c_int64),
        ("columns", c_void_p),
        ("factors", c_void_p),
        ("a", CodesStruct),
        ("b", CodesStruct),
        ("ids", c_void_p),
        ("mean", c_void_p),
        ("mean_rows", c_int64),
    )


class LayerStruct(Structure):
    """``Layer`` of delta.h."""

    _fields_ = (
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("deltas", c_void_p),
        ("biases", c_void_p),
        ("slots", c_int64),
        ("rows", c_int64),
        ("width", c_int64),
        ("codec", c_int32),
        ("unused", c_int32),
    )


class DeltaStruct(Structure):
    """``Delta`` of delta.h."""

    _fields_ = (
        ("rows", c_int64),
        ("width", c_int64),
        ("parts", POINTER(PartStruct)),
        ("count", c_int64),
        ("cycles", c_double),
    )


class MatrixStruct(Structure):
    """``Matrix`` of delta.h."""

    _fields_ = (
        ("data", c_void_p),
        ("stride", c_int64),
        ("rows", c_int64),
        ("width", c_int64),
        ("dtype", c_int32),
        ("unused", c_int32),
    )


class SwapStruct(Structure):
    """``Swap`` of delta.h."""

    _fields_ = (("weight", MatrixStruct), ("delta", c_void_p), ("saved", c_void_p))


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A delta in the kernels' layout; ``address`` is its struct's. A vector ``[n]`` is laid out as ``[1, n]``."""

    shape: tuple[int, ...]
    nbytes: int
    address: int
    rows_alone: Tensor | None
    """The rows it changes, int64, where it changes no others."""
    saved_shape: tuple[int, int] | None
    """Values that swapping in overwrites, ``(rows, K)``, where it is one sparse part."""
    _kept: tuple[Any, ...]


class _Memory:
    """Tensors that a struct points into."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def address(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return tensor.data_ptr()


def prepare(delta: Delta) -> Prepared:
    """Lay out a delta whose tensors are on the CPU.

    Raises ValueError for a part that the kernels cannot run: another block size, columns out of range or out of order.
    """
    rows, width = delta.shape if len(delta.shape) == 2 else (1, delta.shape[0])
    if len(delta.parts) > MAX_PARTS:
        raise ValueError(f"A delta of {len(delta.parts)} parts; the CPU kernels run at most {MAX_PARTS}")
    memory = _Memory()
    parts = (PartStruct * len(delta.parts))(*(_part(part, rows, width, memory) for part in delta.parts))
    struct = DeltaStruct(rows, width, parts, len(parts), sum(_cycles(part, rows, width) for part in delta.parts))
    alone = delta.parts[0] if len(delta.parts) == 1 else None
    return Prepared(
        delta.shape,
        sum(tensor.nbytes for tensor in memory.tensors),
        ctypes.addressof(struct),
        alone.ids if isinstance(alone, Rows) and alone.mean is None else None,
        (rows, alone.columns.shape[1]) if isinstance(alone, Sparse) else None,
        (struct, parts, memory),
    )


def _part(part: Part, rows: int, width: int, memory: _Memory) -> PartStruct:
    match part:
        case Sparse():
            return _sparse(part, width, memory)
        case LowRank():
            return PartStruct(
                kind=_LOW_RANK, kept=part.b.shape[1], a=_codes(part.a, width, memory), b=_columns(part.b, memory)
            )
        case Dense():
            return PartStruct(kind=_DENSE, a=_codes(part.values, width, memory))
        case Rows():
            return _rows(part, rows, width, memory)


def _sparse(part: Sparse, width: int, memory: _Memory) -> PartStruct:
    kept, block = part.values.shape[1:]
    _check_columns(part, width, block)
    wide = width > WIDEST_COLUMN
    columns = pad(part.columns.flatten(), (0, CHUNK)).to(torch.int32 if wide else torch.uint16)
    even = part.factors.numel() == 0 or bool((part.factors == part.factors[0]).all())
    return PartStruct(
        kind=_SPARSE,
        block=block,
        wide_columns=wide,
        gain=float(part.factors[0]) if even and part.factors.numel() else 1.0,
        kept=kept,
        columns=memory.address(columns),
        factors=None if even else memory.address(_shared(part.factors.float().contiguous())),
        a=_codes(part.values, kept * block, memory, float32=wide, unit=block),
    )


def _shared(factors: Tensor) -> Tensor:
    """One copy for all deltas with the same: those of layers with one input, of all variants pruned alike."""
    digest = hashlib.blake2b(factors.numpy().tobytes(), digest_size=16).digest()
    return _FACTORS.setdefault(digest, factors)


def _check_columns(part: Sparse, width: int, block: int) -> None:
    columns = part.columns
    if block not in BLOCKS:
        raise ValueError(f"Blocks of {block} rows; the CPU kernels run {', '.join(map(str, BLOCKS))}")
    if columns.numel() == 0:
        return
    if int(columns.min()) < 0 or int(columns.max()) >= width:
        raise ValueError(
            f"Columns of a sparse part reach from {columns.min()} to {columns.max()}, its width is {width}"
        )
    if not bool((columns.diff(dim=1) > 0).all()):
        raise ValueError("Columns of a sparse part must ascend within each block")


def _rows(part: Rows, rows: int, width: int, memory: _Memory) -> PartStruct:
    ids = part.ids.long().contiguous()
    if len(ids) and (int(ids[0]) < 0 or int(ids[-1]) >= rows or not bool((ids.diff() > 0).all())):
        raise ValueError(f"Row ids must ascend within 0 .. {rows - 1}")
    return PartStruct(
        kind=_ROWS,
        kept=len(ids),
        ids=memory.address(ids),
        mean=None if part.mean is None else memory.address(part.mean.float().contiguous()),
        mean_rows=part.mean_rows,
        a=_codes(part.values, width, memory),
    )


def _codes(codes: Codes, length: int, memory: _Memory, *, float32: bool = False, unit: int = 1) -> CodesStruct:
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
        data=memory.address(data),
        scales=memory.address(codes.scales.bfloat16().contiguous()) if scaled else None,
        length=length,
        line_bytes=padded * bits // 8,
        group=codes.group,
        codec=CODECS.index(codes.codec),
    )


def _columns(codes: Codes, memory: _Memory) -> CodesStruct:
    """Codes ``[rows, r]`` laid out column after column, with a scale for each row."""
    rows, rank = codes.shape
    scaled = codes.codec not in FLOAT_CODECS
    if scaled and codes.group % rank:  # a row with two scales
        codes, scaled = float_codes(decode(codes)), False
    padded = -(-rows // CHUNK) * CHUNK
    if scaled:
        levels = unpack_bits(codes.data, codes.codec, rows * rank).view(rows, rank)
        data = pack_bits(pad(levels.T, (0, padded - rows)).contiguous(), codes.codec)
        scales = pad(codes.scales[torch.arange(rows) * rank // codes.group], (0, padded - rows)).bfloat16()
    else:
        data = pad(codes.data.view(rows, rank).T, (0, padded - rows)).contiguous()
    return CodesStruct(
        data=memory.address(data),
        scales=memory.address(scales) if scaled else None,
        length=rows,
        line_bytes=padded * BITS[codes.codec] // 8,
        group=1,
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
