"""Lay a delta out for the compiled kernels: packed codes stay packed, pointers are taken once.

A line of codes (one block of a sparse part, one row of the others) is padded to whole chunks of 16 values. A delta is
one block of memory that holds its structs and copies of its tensors: of hundreds of variants with hundreds of layers,
objects would outweigh the numbers, and views would keep whole files mapped. Columns and factors are shared by deltas
that have the same, as variants pruned with one seed do. Three rare cases are stored as float32 rather than make
the kernels grow: groups of fewer than 16 values, inputs too wide for 16-bit columns, groups that end inside a column.
"""

import ctypes
import hashlib
from collections.abc import Callable
from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from math import prod
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
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


_SHARED: WeakValueDictionary[bytes, Tensor] = WeakValueDictionary()


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
        ("parts", c_void_p),
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


_OWNED = {PartStruct: ("ids", "mean"), CodesStruct: ("data", "scales")}
"""Pointers into a delta's own memory; columns and factors are shared."""
ALIGNMENT = 8


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
    saved_shape: tuple[int, int] | None
    """Values that swapping in overwrites, ``(rows, K)``, where it is one sparse part."""
    _kept: tuple[Any, ...]


@dataclass(slots=True, eq=False)
class _Memory:
    """What structs point into: tensors to be copied behind them, and tensors that are shared and stay where they are.

    A struct holds an offset into the copies until ``settle``, which turns it into an address.
    """

    copied: list[Tensor] = field(default_factory=list)
    shared: list[Tensor] = field(default_factory=list)
    nbytes: int = 0

    def offset(self, tensor: Tensor) -> int:
        """Where the copy will be, one more than that: 0 means none."""
        self.copied.append(tensor)
        at, self.nbytes = self.nbytes, self.nbytes + _aligned(tensor.nbytes)
        return at + 1

    def share(self, tensor: Tensor) -> int:
        self.shared.append(tensor)
        return tensor.data_ptr()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def prepare(delta: Delta) -> Prepared:
    """Lay out a delta whose tensors are on the CPU.

    Raises ValueError for a part that the kernels cannot run: another block size, columns out of range or out of order.
    """
    rows, width = delta.shape if len(delta.shape) == 2 else (1, delta.shape[0])
    if len(delta.parts) > MAX_PARTS:
        raise ValueError(f"A delta of {len(delta.parts)} parts; the CPU kernels run at most {MAX_PARTS}")
    memory = _Memory()
    parts = [_part(part, rows, width, memory) for part in delta.parts]
    cycles = sum(_cycles(part, rows, width) for part in delta.parts)
    block = _settle(parts, DeltaStruct(rows, width, None, len(parts), cycles), memory)
    alone = delta.parts[0] if len(delta.parts) == 1 else None
    columns_bytes = sum(tensor.nbytes for tensor in memory.shared if tensor.dtype != torch.float32)
    return Prepared(
        delta.shape,
        block.nbytes + columns_bytes,
        block.ctypes.data,
        alone.ids if isinstance(alone, Rows) and alone.mean is None else None,
        (rows, alone.columns.shape[1]) if isinstance(alone, Sparse) else None,
        (block, *memory.shared),
    )


def _settle(parts: list[PartStruct], struct: DeltaStruct, memory: _Memory) -> NDArray[np.uint8]:
    """One block of memory: the delta's struct, those of its parts, and the copies that they point at."""
    size, each = _aligned(ctypes.sizeof(DeltaStruct)), _aligned(ctypes.sizeof(PartStruct))
    head = size + each * len(parts)
    block = np.empty(head + memory.nbytes, np.uint8)
    start = block.ctypes.data
    struct.parts = start + size
    ctypes.memmove(start, ctypes.byref(struct), ctypes.sizeof(struct))
    for i, part in enumerate(parts):
        for held in (part, part.a, part.b):
            for name in _OWNED[type(held)]:
                if offset := getattr(held, name):
                    setattr(held, name, start + head + offset - 1)
        ctypes.memmove(start + size + each * i, ctypes.byref(part), ctypes.sizeof(part))
    at = start + head
    for tensor in memory.copied:
        ctypes.memmove(at, tensor.data_ptr(), tensor.nbytes)
        at += _aligned(tensor.nbytes)
    return block


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
    wide = width > WIDEST_COLUMN
    even = part.factors.numel() == 0 or bool((part.factors == part.factors[0]).all())
    return PartStruct(
        kind=_SPARSE,
        block=block,
        wide_columns=wide,
        gain=float(part.factors[0]) if even and part.factors.numel() else 1.0,
        kept=kept,
        columns=memory.share(_shared(part.columns, f"{width} {block}", lambda: _laid_out(part, width, block))),
        factors=None if even else memory.share(_shared(part.factors, "factors", part.factors.float().contiguous)),
        a=_codes(part.values, kept * block, memory, float32=wide, unit=block),
    )


def _shared(tensor: Tensor, kind: str, lay_out: Callable[[], Tensor]) -> Tensor:
    """One copy for all deltas with the same: those of layers with one input, of all variants pruned alike."""
    key = hashlib.blake2b(tensor.contiguous().numpy().tobytes(), digest_size=16, person=kind.encode()).digest()
    if (known := _SHARED.get(key)) is not None:
        return known
    return _SHARED.setdefault(key, lay_out())


def _laid_out(part: Sparse, width: int, block: int) -> Tensor:
    _check_columns(part, width, block)
    dtype = torch.int32 if width > WIDEST_COLUMN else torch.uint16
    return pad(part.columns.flatten(), (0, CHUNK)).to(dtype)


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
        ids=memory.offset(ids),
        mean=None if part.mean is None else memory.offset(part.mean.float().contiguous()),
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
        data=memory.offset(data),
        scales=memory.offset(codes.scales.bfloat16().contiguous()) if scaled else None,
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
        data=memory.offset(data),
        scales=memory.offset(scales) if scaled else None,
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
