"""The shards of a delta are, bit for bit, the parts of its dense matrix that they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaserve.kernels import reference, shards
from deltaserve.kernels.codes import BITS, FLOAT_CODECS, float_codes, pack_bits
from deltaserve.kernels.dispatch import BACKENDS
from deltaserve.kernels.parts import Codes, Delta, Dense, LowRank, Part, Rows, Sparse
from deltaserve.kernels.segments import Segments

KINDS = ("sparse", "low_rank", "dense", "rows")
LEVELS = {"int8": (-127, 128), "int4": (1, 16), "int2": (0, 4), "sign": (0, 2)}


def quarters(rng: torch.Generator, *shape: int) -> Tensor:
    """Numbers whose sums and products are exact in float32, in any order."""
    return torch.randint(-8, 9, shape, generator=rng) / 4


def codes(rng: torch.Generator, codec: str, shape: tuple[int, ...], group: int) -> Codes:
    values = quarters(rng, *shape)
    if codec in FLOAT_CODECS:
        return float_codes(values, codec)
    levels = torch.randint(*LEVELS[codec], (values.numel(),), generator=rng)
    scales = 2.0 ** torch.randint(-2, 2, (-(-values.numel() // group),), generator=rng)
    return Codes(
        codec, shape, pack_bits(levels, codec) if len(levels) else torch.empty(0).byte(), scales.bfloat16(), group
    )


def part(rng: torch.Generator, kind: str, codec: str, shape: tuple[int, int], block: int, group: int) -> Part:
    out, width = shape
    match kind:
        case "sparse":
            blocks, kept = -(-out // block), int(torch.randint(1, width + 1, (), generator=rng))
            drawn = [torch.randperm(width, generator=rng)[:kept].sort().values for _ in range(blocks)]
            values = codes(rng, codec, (blocks, kept, block), group)
            return Sparse(shape, torch.stack(drawn).int(), values, quarters(rng, width))
        case "low_rank":
            return LowRank(shape, codes(rng, codec, (3, width), group), codes(rng, codec, (out, 3), group))
        case "dense":
            return Dense(shape, codes(rng, codec, shape, group))
    count = int(torch.randint(0, out + 1, (), generator=rng))
    ids = torch.randperm(out, generator=rng)[:count].sort().values
    mean = torch.randn(width, generator=rng) if count % 2 else None
    return Rows(
        shape, ids, codes(rng, codec, (count, width), group), mean, int(torch.randint(out + 1, (), generator=rng))
    )


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    """Of one to three parts, of any kind, codec, block and group, which need not fit the shape in any way."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.tuples(st.integers(2, 70), st.integers(2, 50)))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    return Delta(
        shape,
        tuple(
            part(
                rng,
                kind,
                draw(st.sampled_from(sorted(BITS))),
                shape,
                draw(st.sampled_from((1, 4, 8, 16, 32, 64))),
                draw(st.sampled_from((1, 3, 16, 32, 64, 128))),
            )
            for kind in kinds
        ),
    )


def bounds(length: int, world: int) -> list[tuple[int, int]]:
    """As even as it can be; the last is longer where it does not divide."""
    each = max(length // world, 1)
    starts = range(0, min(each * world, length), each)
    return [(start, start + each if start + each < starts.stop else length) for start in starts]


@given(deltas(), st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_shards_put_together_are_the_whole_delta(delta: Delta, world: int) -> None:
    whole = reference.unpack(delta)
    by_rows = [shards.rows(delta, *one) for one in bounds(delta.shape[0], world)]
    by_columns = [shards.columns(delta, *one) for one in bounds(delta.shape[1], world)]
    assert torch.equal(torch.cat([reference.unpack(one) for one in by_rows]), whole)
    assert torch.equal(torch.cat([reference.unpack(one) for one in by_columns], 1), whole)


@given(deltas(), st.data())
@settings(max_examples=100, deadline=None)
def test_any_rows_and_columns_of_a_shard_can_be_taken(delta: Delta, data: st.DataObject) -> None:
    def some(length: int) -> tuple[int, int]:
        start = data.draw(st.integers(0, length - 1))
        return start, data.draw(st.integers(start + 1, length))

    (top, bottom), (left, right) = some(delta.shape[0]), some(delta.shape[1])
    shard = shards.columns(shards.rows(delta, top, bottom), left, right)
    assert shard.shape == (bottom - top, right - left)
    assert torch.equal(reference.unpack(shard), reference.unpack(delta)[top:bottom, left:right])


@given(deltas(), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_every_backend_runs_shards(delta: Delta, world: int) -> None:
    """Rows concatenate, columns add up: what the layers of several processes do with them."""
    x = torch.randn(5, delta.shape[1], generator=torch.Generator().manual_seed(1))
    wanted = x @ reference.unpack(delta).T
    for backend in BACKENDS.values():
        by_rows = [product(backend, shards.rows(delta, *one), x) for one in bounds(delta.shape[0], world)]
        by_columns = [
            product(backend, shards.columns(delta, *one), x[:, slice(*one)].contiguous())
            for one in bounds(delta.shape[1], world)
        ]
        tolerance = 1e-4 * wanted.abs().max().clamp(min=1)
        assert (torch.cat(by_rows, 1) - wanted).abs().max() <= tolerance
        assert (sum(by_columns) - wanted).abs().max() <= tolerance


def product(backend: object, shard: Delta, x: Tensor) -> Tensor:
    y = torch.zeros(len(x), shard.shape[0])
    backend.delta_linear_(y, x, backend.slots([backend.prepare(shard)]), Segments.of([len(x)], [0]))
    return y


def test_whole_blocks_keep_their_codes() -> None:
    """What models have: heads and widths are multiples of 64, so that nothing grows."""
    delta = Delta((256, 96), (part(torch.Generator(), "sparse", "int4", (256, 96), 64, 64),))
    kept = delta.parts[0].columns.shape[1]
    shard = shards.rows(delta, 128, 256).parts[0]
    assert (shard.values.codec, shard.values.group, shard.values.shape) == ("int4", 64, (2, kept, 64))
    assert torch.equal(shard.columns, delta.parts[0].columns[2:])


def test_columns_keep_their_codes_with_a_scale_each() -> None:
    delta = Delta((128, 96), (part(torch.Generator(), "sparse", "sign", (128, 96), 64, 128),))
    shard = shards.columns(delta, 0, 48).parts[0]
    assert (shard.values.codec, shard.values.group) == ("int4", 64)
    assert len(shard.values.scales) == shard.columns.numel()


def test_a_vector_is_cut_as_rows_and_has_no_columns() -> None:
    delta = Delta((10,), (Dense((10,), float_codes(torch.arange(10.0))),))
    assert reference.unpack(shards.rows(delta, 4, 10)).tolist() == [4, 5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match=r"shape \[10\] has no columns"):
        shards.columns(delta, 0, 5)


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 5), (6, 5), (0, 11)])
def test_what_is_out_of_range_is_refused(start: int, stop: int) -> None:
    delta = Delta((10, 10), (Dense((10, 10), float_codes(torch.zeros(10, 10))),))
    for cut in (shards.rows, shards.columns):
        with pytest.raises(ValueError, match=f"Cannot take {start} to {stop} of 10"):
            cut(delta, start, stop)
