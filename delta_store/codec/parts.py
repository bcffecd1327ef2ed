"""Parts as bytes: the layout of every kind, and the check that bytes have the length their specification says.

========  ================================================================
sparse    numbers; explicit columns: ascending
low_rank  numbers of ``a``, numbers of ``b``
factors   the same of survivors alone, ``b`` transposed
dense     numbers
rows      numbers, mean (float32 ``[in]``, if there is one), ids: ascending
xor       CRC-32 of the fine-tune, zstd of byte planes (``xor.py``)
========  ================================================================

*Numbers* are their bfloat16 scales, then the packed values (``kernels/codes.py``); *ascending* is zstd of the byte
planes of gaps (``planes.py``). All is little-endian.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from deltaserve.delta_store.codec.columns import ColumnWeights, explicit_factors, seeded_columns
from deltaserve.delta_store.codec.encode import SparseFactors, row_group
from deltaserve.delta_store.codec.planes import expand_ascending, squeeze_ascending
from deltaserve.delta_store.codec.specs import DenseSpec, FactorsSpec, LowRankSpec, RowsSpec, SparseSpec, Spec, XorSpec
from deltaserve.delta_store.codec.xor import CRC_BYTES, XorPayload, restore
from deltaserve.delta_store.errors import ArtifactError, BaseMismatch, CorruptArtifact
from deltaserve.kernels.codes import BITS, FLOAT_CODECS, float_codes
from deltaserve.kernels.parts import Codes, Delta, Dense, LowRank, Part, Rows, Sparse
from deltaserve.kernels.reference import unpack

Stored = Part | SparseFactors | XorPayload
"""What can be written: parts as kernels take them, and two kinds that become such parts when they are decoded."""

EXPONENTS = {torch.bfloat16: (torch.int16, 0x7F80), torch.float32: (torch.int32, 0x7F800000)}
"""Their bits, all of which are set in what is infinite or no number."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """Where and how one tensor of codes is stored."""

    codec: str
    shape: tuple[int, ...]
    group: int
    scale_bytes: int = field(init=False)
    value_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        count = prod(self.shape)
        scales = 0 if self.codec in FLOAT_CODECS else -(-count // self.group)
        object.__setattr__(self, "scale_bytes", scales * 2)
        object.__setattr__(self, "value_bytes", -(-count * BITS[self.codec] // 8))


def check_length(spec: Spec, length: int) -> None:
    """Raises CorruptArtifact if a part of this specification cannot have ``length`` bytes."""
    least = _fixed_bytes(spec)
    if length < least or (length > least and not _has_compressed_end(spec)):
        raise CorruptArtifact(f"a {spec.kind} part has {length} bytes where its specification asks for {least}")


def encode(part: Stored, spec: Spec) -> bytes:
    """The part's bytes. Raises ArtifactError if part and specification do not agree."""
    match part, spec:
        case Sparse(), SparseSpec():
            columns = squeeze_ascending(part.columns.numpy()) if spec.mask == "explicit" else b""
            return _encode_codes(spec, part.values) + columns
        case LowRank(), LowRankSpec():
            return _encode_codes(spec, part.a, part.b)
        case SparseFactors(), FactorsSpec():
            return _encode_codes(spec, part.a.values, part.b.values)
        case Dense(), DenseSpec():
            return _encode_codes(spec, part.values)
        case Rows(), RowsSpec() if spec.has_mean == (part.mean is not None):
            mean = b"" if part.mean is None else _raw(part.mean)
            return _encode_codes(spec, part.values) + mean + squeeze_ascending(part.ids[None].numpy())
        case XorPayload(), XorSpec():
            return part.data
    raise ArtifactError(f"A {type(part).__name__} part does not agree with its specification: {spec}")


def decode(data: Tensor, spec: Spec, name: str, profile: ColumnWeights | None, base: Tensor | None) -> Part:
    """The part of parameter ``name`` from its bytes uint8 ``[n]``; only xor needs ``base`` (``[out, in]`` or ``[n]``).

    Raises CorruptArtifact, ProfileMissing, BaseMismatch.
    """
    check_length(spec, len(data))
    codes, rest = _decode_codes(spec, data)
    match spec:
        case SparseSpec() if spec.mask == "explicit":
            columns = expand_ascending(_bytes(rest), spec.blocks, spec.kept, spec.shape[1])
            return Sparse(spec.shape, torch.from_numpy(columns.astype(np.int32)), codes[0], explicit_factors(spec))
        case SparseSpec():
            seeded, factors = seeded_columns(spec, name, profile)
            return Sparse(spec.shape, seeded, codes[0], factors)
        case LowRankSpec():
            return LowRank(spec.shape, *codes)
        case FactorsSpec():
            a = _decode_factor(spec.a, f"{name}:a", codes[0])
            return LowRank(spec.shape, float_codes(a), float_codes(_decode_factor(spec.b, f"{name}:b", codes[1]).T))
        case DenseSpec():
            return Dense(spec.shape, *codes)
        case RowsSpec():
            return _decode_rows(spec, codes[0], rest)
        case XorSpec():
            return _decode_xor(spec, rest, base)


@lru_cache(maxsize=1024)
def _numbers(spec: Spec) -> tuple[Numbers, ...]:
    match spec:
        case SparseSpec():
            return (Numbers(spec.codec, (spec.blocks, spec.kept, spec.block), spec.group),)
        case LowRankSpec():
            out, width = spec.shape
            a = Numbers(spec.codec, (spec.rank, width), row_group(spec.codec, width))
            return a, Numbers(spec.codec, (out, spec.rank), spec.group)
        case FactorsSpec():
            return _numbers(spec.a) + _numbers(spec.b)
        case DenseSpec():
            return (Numbers(spec.codec, spec.shape, spec.group),)
        case RowsSpec():
            width = spec.shape[1]
            return (Numbers(spec.codec, (spec.count, width), row_group(spec.codec, width)),)
        case XorSpec():
            return ()


@lru_cache(maxsize=1024)
def _fixed_bytes(spec: Spec) -> int:
    mean = 4 * spec.shape[1] if isinstance(spec, RowsSpec) and spec.has_mean else 0
    crc = CRC_BYTES if isinstance(spec, XorSpec) else 0
    return sum(numbers.scale_bytes + numbers.value_bytes for numbers in _numbers(spec)) + mean + crc


def _has_compressed_end(spec: Spec) -> bool:
    return isinstance(spec, RowsSpec | XorSpec) or (isinstance(spec, SparseSpec) and spec.mask == "explicit")


def _encode_codes(spec: Spec, *tensors: Codes) -> bytes:
    expected = _numbers(spec)
    if [(codes.codec, codes.shape, codes.group) for codes in tensors] != [
        (n.codec, n.shape, n.group) for n in expected
    ]:
        raise ArtifactError(f"Values of shapes {[list(codes.shape) for codes in tensors]} do not fit {spec}")
    return b"".join(_raw(codes.scales) + _raw(codes.data) for codes in tensors)


def _decode_codes(spec: Spec, data: Tensor) -> tuple[list[Codes], Tensor]:
    """The codes at the start of ``data``, and what follows them."""
    tensors = []
    for n in _numbers(spec):
        scales, data = data[: n.scale_bytes], data[n.scale_bytes :]
        packed, data = data[: n.value_bytes], data[n.value_bytes :]
        values = _finite(packed, FLOAT_CODECS[n.codec]) if n.codec in FLOAT_CODECS else packed
        tensors.append(Codes(n.codec, n.shape, values, _finite(scales, torch.bfloat16), n.group))
    return tensors, data


def _decode_rows(spec: RowsSpec, values: Codes, rest: Tensor) -> Rows:
    mean_bytes = 4 * spec.shape[1] if spec.has_mean else 0
    mean = _finite(rest[:mean_bytes], torch.float32) if spec.has_mean else None
    ids = expand_ascending(_bytes(rest[mean_bytes:]), 1, spec.count, spec.shape[0])[0]
    return Rows(spec.shape, torch.from_numpy(ids), values, mean, spec.base_rows)


def _decode_factor(spec: SparseSpec, name: str, codes: Codes) -> Tensor:
    """float32 ``[rank, width]``"""
    columns, factors = seeded_columns(spec, name, None)
    return unpack(Delta(spec.shape, (Sparse(spec.shape, columns, codes, factors),)))


def _decode_xor(spec: XorSpec, data: Tensor, base: Tensor | None) -> Dense:
    """The difference in float32; what the fine-tune has beyond the base's rows is its own value."""
    if base is None:
        raise BaseMismatch("a lossless delta can only be decoded beside the base's tensor")
    difference = restore(_bytes(data), spec, base).float()
    difference[: len(base)] -= base.float()
    return Dense(spec.shape, float_codes(difference))


def _finite(data: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy (a view would have to be aligned) as ``dtype``."""
    integer, exponent = EXPONENTS[dtype]
    values = data.clone().view(dtype)
    if ((values.view(integer).numpy() & exponent) == exponent).any():
        raise CorruptArtifact("a stored number is not finite")
    return values


def _raw(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def _bytes(data: Tensor) -> bytes:
    return data.numpy().tobytes()
