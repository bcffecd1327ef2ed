"""Read packed columns and values, of any codec, into registers."""
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

import triton
import triton.language as tl

from deltaserve.kernels.triton.descriptor import DATA, LOG_BITS, LOG_GROUP, SCALES, TWICE_OFFSET


@triton.jit
def packed(fields):
    """The packed numbers described at ``fields``: where, how wide, and the bits of one. Read it before a loop."""
    log_bits = tl.load(fields + LOG_BITS).to(tl.int32)
    ones = (tl.full([], -1, tl.int32).to(tl.uint32, bitcast=True)) >> (32 - (1 << log_bits)).to(tl.uint32)
    return tl.load(fields + DATA).to(tl.pointer_type(tl.uint32)), log_bits, ones


@triton.jit
def coded(fields):
    """The values described at ``fields``: packed numbers and what turns them into values. Read it before a loop."""
    scales = tl.load(fields + SCALES).to(tl.pointer_type(tl.uint16))
    log_group = tl.load(fields + LOG_GROUP).to(tl.int32)
    return packed(fields), scales, log_group, tl.load(fields + TWICE_OFFSET).to(tl.int32)


@triton.jit
def number(numbers, place, mask):
    """uint32: the packed number at ``place``."""
    words, log_bits, ones = numbers
    word = tl.load(words + (place >> (5 - log_bits)), mask, 0)
    return (word >> ((place << log_bits) & 31).to(tl.uint32)) & ones


@triton.jit
def value(codes, place, mask):
    """float32: the value at ``place``, as ``codes.decode`` gives it.

    One path for all codecs: which one a variant has is not known when the kernel is compiled or captured.
    """
    numbers, scales, log_group, twice_offset = codes
    code = number(numbers, place, mask)
    if numbers[1] < 4:
        scale = tl.load(scales + (place >> log_group), mask, 0).to(tl.uint32) << 16  # bfloat16 to float32
        result = (2 * code.to(tl.int32) - twice_offset).to(tl.float32) * scale.to(tl.float32, bitcast=True)
    else:  # float32, or bfloat16, which is the upper half of one
        result = (code << (32 - (1 << numbers[1])).to(tl.uint32)).to(tl.float32, bitcast=True)
    return result
