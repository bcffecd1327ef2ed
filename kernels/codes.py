"""Value codecs: how the numbers of a part are packed into bytes, and back.

Values are packed in flat order, the first in the lowest bits of the first byte, the last byte filled with zeros:

=========  ====  ==========================================================
codec      bits  value
=========  ====  ==========================================================
float32    32    itself
bf16       16    itself
int8       8     scale * code, code in -127 .. 127 (two's complement)
int4       4     scale * (code - 8), code in 1 .. 15
int2       2     scale * (code - 1.5), code in 0 .. 3
sign       1     scale * (2 * code - 1), code in 0 .. 1
=========  ====  ==========================================================
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from deltaserve.kernels.parts import Codes

BITS = {"float32": 32, "bf16": 16, "int8": 8, "int4": 4, "int2": 2, "sign": 1}
OFFSETS = {"int8": 0.0, "int4": 8.0, "int2": 1.5, "sign": 0.5}
STEPS = {"int8": 1.0, "int4": 1.0, "int2": 1.0, "sign": 2.0}
FLOAT_CODECS = {"float32": torch.float32, "bf16": torch.bfloat16}


def decode(codes: Codes) -> Tensor:
    """float32 of ``codes.shape``: ``scale[i // group] * step * (code[i] - offset)``."""
    if codes.codec in FLOAT_CODECS:
        return codes.data.float().reshape(codes.shape)
    count = prod(codes.shape)
    levels = (unpack_bits(codes.data, codes.codec, count) - OFFSETS[codes.codec]) * STEPS[codes.codec]
    scales = codes.scales.float().repeat_interleave(codes.group)[:count]
    return (levels * scales).reshape(codes.shape)


def pack_bits(levels: Tensor, codec: str) -> Tensor:
    """uint8 ``[ceil(n * bits / 8)]`` from integer codes ``[n]``, as the table above stores them."""
    flat = levels.flatten()
    if codec == "int8":
        return flat.to(torch.int8).view(torch.uint8)
    per_byte = 8 // BITS[codec]
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % per_byte)).view(-1, per_byte)
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=flat.device) * BITS[codec]
    return (padded << shifts).sum(1).to(torch.uint8)


def unpack_bits(data: Tensor, codec: str, count: int) -> Tensor:
    """float32 ``[count]``: the integer codes that ``pack_bits`` stored."""
    if codec == "int8":
        return data.view(torch.int8)[:count].float()
    per_byte = 8 // BITS[codec]
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=data.device) * BITS[codec]
    fields = (data[:, None] >> shifts) & (2 ** BITS[codec] - 1)
    return fields.flatten()[:count].float()


def float_codes(values: Tensor, codec: str = "float32", shape: Sequence[int] | None = None) -> Codes:
    """``values`` as unscaled codes of a float codec."""
    dtype = FLOAT_CODECS[codec]
    data = values.to(dtype).flatten()
    return Codes(codec, tuple(shape or values.shape), data, torch.empty(0, dtype=torch.bfloat16), 1)
