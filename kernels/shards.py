"""A delta cut as its weight is: some of its rows, or some of its columns, for a base that lies on several processes.

Nothing is rounded: a shard's values are those of the whole delta, bit for bit. Codes stay packed, with more scales
where a cut goes through the values that shared one. What a cut can cost in memory is said where it happens.
"""

from math import gcd, prod

import torch
from torch import Tensor

from deltaserve.kernels.codes import BITS, FLOAT_CODECS, decode, float_codes, pack_bits, unpack_bits
from deltaserve.kernels.parts import Codes, Delta, Dense, LowRank, Part, Rows, Sparse


def rows(delta: Delta, start: int, stop: int) -> Delta:
    """Rows ``start`` to ``stop`` of a weight's delta, or entries of a vector's. Raises ValueError out of range."""
    _check(start, stop, delta.shape[0])
    shape = (stop - start, *delta.shape[1:])
    return Delta(shape, tuple(_rows_of(part, start, stop, shape) for part in delta.parts))


def columns(delta: Delta, start: int, stop: int) -> Delta:
    """Columns ``start`` to ``stop`` of a weight's delta. Raises ValueError out of range, and for a vector's."""
    if len(delta.shape) != 2:
        raise ValueError(f"A delta of shape {list(delta.shape)} has no columns")
    _check(start, stop, delta.shape[1])
    shape = (delta.shape[0], stop - start)
    return Delta(shape, tuple(_columns_of(part, start, stop, shape) for part in delta.parts))


def _check(start: int, stop: int, length: int) -> None:
    if not 0 <= start < stop <= length:
        raise ValueError(f"Cannot take {start} to {stop} of {length}")


def _rows_of(part: Part, start: int, stop: int, shape: tuple[int, ...]) -> Part:
    match part:
        case Sparse():
            return _rows_of_sparse(part, start, stop, (shape[0], shape[1]))
        case LowRank():
            return LowRank((shape[0], shape[1]), part.a, _lines(part.b, start, stop))
        case Dense():
            return Dense(shape, _lines(part.values, start, stop))
        case Rows():
            first, last = torch.searchsorted(part.ids, torch.tensor([start, stop])).tolist()
            mean_rows = min(max(part.mean_rows - start, 0), stop - start)
            values = _lines(part.values, first, last)
            return Rows((shape[0], shape[1]), part.ids[first:last] - start, values, part.mean, mean_rows)


def _columns_of(part: Part, start: int, stop: int, shape: tuple[int, int]) -> Part:
    match part:
        case Sparse():
            return _columns_of_sparse(part, start, stop, shape)
        case LowRank():
            return LowRank(shape, _within(part.a, start, stop), part.b)
        case Dense():
            return Dense(shape, _within(part.values, start, stop))
        case Rows():
            mean = None if part.mean is None else part.mean[start:stop].contiguous()
            return Rows(shape, part.ids, _within(part.values, start, stop), mean, part.mean_rows)


def _rows_of_sparse(part: Sparse, start: int, stop: int, shape: tuple[int, int]) -> Sparse:
    """Whole blocks as they are. A boundary inside a block makes blocks smaller, and their values float32."""
    block = part.values.shape[2]
    ends_a_block = stop % block == 0 or stop == part.shape[0]
    first, last = start // block, -(-stop // block)
    if start % block == 0 and ends_a_block:
        values = _lines(part.values, first, last)
        return Sparse(shape, part.columns[first:last], values, part.factors)
    finer = gcd(block, start, 0 if stop == part.shape[0] else stop)
    finer = 1 if finer == 2 else finer  # kernels have no blocks of two rows
    kept, times = part.values.shape[1], block // finer
    floats = decode(_lines(part.values, first, last)).view(-1, kept, times, finer).transpose(1, 2)
    taken = slice(start // finer - first * times, -(-stop // finer) - first * times)
    return Sparse(
        shape,
        part.columns[first:last].repeat_interleave(times, 0)[taken],
        float_codes(floats.reshape(-1, kept, finer)[taken]),
        part.factors,
    )


def _columns_of_sparse(part: Sparse, start: int, stop: int, shape: tuple[int, int]) -> Sparse:
    """Blocks keep different numbers of columns here: zeros fill them up to the largest.

    Every column gets scales of its own. int2 and sign have no zero and become int4, which has all of their values.
    """
    blocks, kept, block = part.values.shape
    inside = (part.columns >= start) & (part.columns < stop)
    chosen, is_kept = _filled_up(part.columns, inside, start, stop)
    count = chosen.shape[1]
    codes = part.values
    if codes.codec in FLOAT_CODECS:
        values = codes.data.new_zeros(blocks, count, block)
        values[is_kept] = codes.data.view(blocks, kept, block)[inside]
        new = Codes(codes.codec, (blocks, count, block), values.flatten(), codes.scales, codes.group)
    else:
        levels, scales, codec = _with_zero(codes)
        zero = 0 if codec == "int8" else 8
        values = levels.new_full((blocks, count, block), zero)
        values[is_kept] = levels.view(blocks, kept, block)[inside]
        group = gcd(codes.group, block)
        firsts = torch.arange(blocks * kept * block // group) * group
        each = scales[firsts // codes.group].view(blocks, kept, -1)
        shared = scales.new_ones(blocks, count, each.shape[2])
        shared[is_kept] = each[inside]
        new = Codes(codec, (blocks, count, block), pack_bits(values, codec), shared.flatten(), group)
    return Sparse(shape, chosen, new, part.factors[start:stop].contiguous())


def _filled_up(columns: Tensor, inside: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """int32 ``[blocks, count]`` ascending, from ``start`` on, with as many others as make all blocks equally long, and
    bool of that shape: which of them were kept."""
    mask = torch.zeros(len(columns), stop - start, dtype=torch.bool)
    mask[inside.nonzero()[:, 0], columns[inside].long() - start] = True
    each = mask.sum(1)
    count = max(int(each.max()), 1)
    free = ~mask
    filler = free & (free.cumsum(1, dtype=torch.int32) <= (count - each)[:, None])
    chosen = (mask | filler).nonzero()[:, 1].view(-1, count)
    return chosen.int(), mask.gather(1, chosen)


def _with_zero(codes: Codes) -> tuple[Tensor, Tensor, str]:
    """Levels float32 ``[n]``, scales and codec of the same values, in a codec that can say zero."""
    levels = unpack_bits(codes.data, codes.codec, prod(codes.shape))
    match codes.codec:
        case "int2":
            return 2 * levels + 5, codes.scales / 2, "int4"  # scale * (code - 1.5) = scale / 2 * (2 * code + 5 - 8)
        case "sign":
            return 2 * levels + 7, codes.scales, "int4"  # scale * (2 * code - 1) = scale * (2 * code + 7 - 8)
    return levels, codes.scales, codes.codec


def _lines(codes: Codes, first: int, last: int) -> Codes:
    """``codes[first:last]``."""
    length = prod(codes.shape[1:])
    start, count = first * length, (last - first) * length
    shape = (last - first, *codes.shape[1:])
    if codes.codec in FLOAT_CODECS:
        return Codes(codes.codec, shape, codes.data[start : start + count], codes.scales, codes.group)
    group = gcd(codes.group, start)
    scales = codes.scales[(start + torch.arange(-(-count // group)) * group) // codes.group]
    return Codes(codes.codec, shape, _packed(codes, start, count), scales, group)


def _within(codes: Codes, first: int, last: int) -> Codes:
    """``codes[:, first:last]`` of two dimensions."""
    lines, length = codes.shape
    width = last - first
    if codes.codec in FLOAT_CODECS:
        data = codes.data.view(lines, length)[:, first:last].flatten()
        return Codes(codes.codec, (lines, width), data, codes.scales, codes.group)
    levels = unpack_bits(codes.data, codes.codec, lines * length).view(lines, length)[:, first:last]
    group = gcd(codes.group, length, first, width)
    begins = torch.arange(lines)[:, None] * length + torch.arange(first, last, group)
    scales = codes.scales[begins.flatten() // codes.group]
    return Codes(codes.codec, (lines, width), _pack(levels, codes.codec), scales, group)


def _packed(codes: Codes, start: int, count: int) -> Tensor:
    """The bytes of ``count`` values from ``start`` on."""
    bits = BITS[codes.codec]
    data = codes.data[start * bits // 8 : -(-(start + count) * bits // 8)]
    skipped = start * bits % 8 // bits
    if skipped == 0 and count * bits % 8 == 0:
        return data
    return _pack(unpack_bits(data, codes.codec, skipped + count)[skipped:], codes.codec)


def _pack(levels: Tensor, codec: str) -> Tensor:
    return pack_bits(levels, codec) if levels.numel() else torch.empty(0, dtype=torch.uint8)
