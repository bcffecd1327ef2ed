"""Lossless deltas: the XOR of the fine-tune's bit patterns with the base's, from which every bit comes back.

The payload starts with the CRC-32 of the fine-tune's bytes, so that a base with other values is noticed.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltaserve.delta_store.codec.planes import FAST, expand, squeeze
from deltaserve.delta_store.codec.specs import XorSpec
from deltaserve.delta_store.errors import BaseMismatch, UnsupportedCheckpoint

CRC_BYTES = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WORDS = {4: (torch.int32, np.uint32), 2: (torch.int16, np.uint16)}


@dataclass(frozen=True, slots=True, eq=False)
class XorPayload:
    """What the artifact stores for an ``XorSpec``."""

    data: bytes


def xor(base: Tensor, fine: Tensor, *, transposed: bool = False) -> tuple[XorSpec, XorPayload]:
    """``fine`` relative to ``base``, both ``[out, in]`` or ``[n]``; ``base`` is first rounded to ``fine``'s dtype.

    Raises UnsupportedCheckpoint unless that is float32, bfloat16 or float16.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    if fine.dtype not in names:
        raise UnsupportedCheckpoint(f"{fine.dtype} cannot be stored losslessly; convert to one of {', '.join(DTYPES)}")
    spec = XorSpec.model_validate(
        {"shape": tuple(fine.shape), "dtype": names[fine.dtype], "transposed": transposed}, strict=True
    )
    bits = _bits(fine)
    difference = squeeze(bits ^ _base_bits(base, spec), FAST)
    return spec, XorPayload(_crc(bits) + difference)


def restore(data: bytes, spec: XorSpec, base: Tensor) -> Tensor:
    """The fine-tune's tensor, of ``spec.dtype``, bit for bit. Raises BaseMismatch, CorruptArtifact."""
    base_bits = _base_bits(base, spec)
    bits = base_bits ^ expand(data[CRC_BYTES:], base_bits.size, base_bits.dtype).reshape(base_bits.shape)
    if _crc(bits) != data[:CRC_BYTES]:
        raise BaseMismatch(
            "the base's values are not those the delta was made from; use the original base, unconverted"
        )
    return torch.from_numpy(bits.view(f"i{spec.item_bytes}")).view(DTYPES[spec.dtype])


def _base_bits(base: Tensor, spec: XorSpec) -> NDArray[np.unsignedinteger]:
    """The base's bits in ``spec.dtype``, with zero rows up to ``spec.shape`` (at most as many as it has)."""
    added = spec.shape[0] - base.shape[0]
    if base.dim() != len(spec.shape) or base.shape[1:] != spec.shape[1:] or not 0 <= added <= base.shape[0]:
        raise BaseMismatch(f"the delta has shape {list(spec.shape)}, the base's tensor {list(base.shape)}")
    rounded = base.detach().to(DTYPES[spec.dtype])
    return _bits(torch.cat([rounded, rounded.new_zeros(added, *base.shape[1:])]))


def _bits(values: Tensor) -> NDArray[np.unsignedinteger]:
    signed, unsigned = WORDS[values.element_size()]
    return values.detach().contiguous().view(signed).numpy().view(unsigned)


def _crc(bits: NDArray[np.unsignedinteger]) -> bytes:
    return zlib.crc32(bits.astype(bits.dtype.newbyteorder("<"), copy=False).tobytes()).to_bytes(CRC_BYTES, "little")
