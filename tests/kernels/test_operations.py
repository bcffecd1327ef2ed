"""Every backend's operations against the dense oracle, over shapes, dtypes, blocks, codecs, parts and batch mixes."""

import pytest
import torch
from dense_oracle import (
    BLOCKS,
    CODECS,
    MIXES,
    SIZES,
    TOLERANCE,
    assert_close,
    random_codes,
    random_delta,
    random_segments,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.kernels import dispatch
from deltaserve.kernels.codes import float_codes
from deltaserve.kernels.parts import Delta, Dense
from deltaserve.kernels.reference import unpack
from deltaserve.kernels.segments import BASE, Segments

KINDS = ("sparse", "low_rank", "dense", "rows")
backends = pytest.mark.parametrize("backend", dispatch.BACKENDS.values(), ids=dispatch.BACKENDS)
cases = given(
    seed=st.integers(0, 2**31),
    out=st.sampled_from(SIZES),
    width=st.sampled_from(SIZES),
    block=st.sampled_from(BLOCKS),
    codec=st.sampled_from(CODECS),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True),
    mix=st.sampled_from(MIXES),
    slots=st.integers(1, 4),
    dtype=st.sampled_from(list(TOLERANCE)),
)


def bank_of(backend, rng, slots, kinds, out, width, block, codec):
    """Prepared deltas and their dense meaning; the last of several slots leaves the layer as it is."""
    pairs = [random_delta(rng, kinds, out, width, block, codec) for _ in range(slots)]
    bank = [backend.prepare(delta) for delta, _ in pairs]
    dense = [meaning for _, meaning in pairs]
    if slots > 2:
        bank[-1], dense[-1] = None, torch.zeros(out, width, dtype=torch.float64)
    return bank, dense


@backends
@settings(max_examples=120, deadline=None)
@cases
def test_delta_linear_equals_the_dense_product(backend, seed, out, width, block, codec, kinds, mix, slots, dtype):
    rng = torch.Generator().manual_seed(seed)
    bank, dense = bank_of(backend, rng, slots, kinds, out, width, block, codec)
    segments, owner = random_segments(mix, 6, slots, seed)
    x = torch.randn(len(owner), width * 2, generator=rng).to(dtype)[:, ::2]  # not contiguous
    y = torch.randn(len(owner), out + 2, generator=rng).to(dtype)  # wider than the delta: its last columns stay
    before = y.clone()
    expected = y.double()
    for row, slot in enumerate(owner):
        if slot != BASE:
            expected[row, :out] += dense[slot] @ x[row].double()

    backend.delta_linear_(y, x, bank, segments)

    touched = torch.tensor([slot != BASE for slot in owner], dtype=torch.bool)
    assert torch.equal(y[~touched], before[~touched])
    assert torch.equal(y[:, out:], before[:, out:])
    if touched.any():
        assert_close(y[touched, :out], expected[touched, :out], dtype, "y")


@backends
@settings(max_examples=80, deadline=None)
@cases
def test_delta_embedding_equals_the_dense_rows(backend, seed, out, width, block, codec, kinds, mix, slots, dtype):
    rng = torch.Generator().manual_seed(seed)
    bank, dense = bank_of(backend, rng, slots, kinds, out, width, block, codec)
    segments, owner = random_segments(mix, 6, slots, seed)
    ids = torch.randint(0, out, (len(owner),), generator=rng)
    y = torch.randn(len(owner), width, generator=rng).to(dtype)
    before = y.clone()
    expected = y.double()
    for row, slot in enumerate(owner):
        if slot != BASE:
            expected[row] += dense[slot][ids[row]]

    backend.delta_embedding_(y, ids, bank, segments)

    touched = torch.tensor([slot != BASE for slot in owner], dtype=torch.bool)
    assert torch.equal(y[~touched], before[~touched])
    if touched.any():
        assert_close(y[touched], expected[touched], dtype, "y")


@settings(max_examples=80, deadline=None)
@cases
def test_unpack_is_the_sum_of_the_parts(seed, out, width, block, codec, kinds, mix, slots, dtype):
    delta, dense = random_delta(torch.Generator().manual_seed(seed), kinds, out, width, block, codec)
    parts = torch.stack([unpack(Delta(delta.shape, (part,))).double() for part in delta.parts])
    size = parts.pow(2).sum(0).mean().sqrt()  # of the parts: where they cancel, their sum is smaller than its rounding
    error = (unpack(delta).double() - dense).pow(2).mean().sqrt()
    assert error <= TOLERANCE[torch.float32] * size, f"relative error {float(error / size):.2e}"


@backends
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swapping_in_and_out_in_any_order_leaves_the_base_bit_identical(backend, dtype):
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(133, 63, generator=rng).to(dtype)
    original = weight.clone()
    for codec, block in zip(CODECS, BLOCKS, strict=True):
        for kinds in (["sparse"], ["low_rank"], ["dense"], ["rows"], list(KINDS)):
            delta, dense = random_delta(rng, kinds, 133, 63, block, codec)
            token = backend.swap_in_(weight, delta)
            assert_close(weight, original.double() + dense, dtype, f"weight with {kinds} {codec}")
            backend.swap_out_(weight, token)
            assert torch.equal(weight.view(torch.uint8), original.view(torch.uint8))


@backends
def test_a_vector_is_swapped_too(backend):
    codes, numbers = random_codes(torch.Generator().manual_seed(2), "int8", (63,), 16)
    vector = torch.ones(63)
    token = backend.swap_in_(vector, Delta((63,), (Dense((63,), codes),)))
    assert_close(vector, numbers + 1, torch.float32, "vector")
    backend.swap_out_(vector, token)
    assert torch.equal(vector, torch.ones(63))


@pytest.mark.parametrize("codec", CODECS)
def test_a_vector_delta_unpacks_to_its_values(codec):
    codes, numbers = random_codes(torch.Generator().manual_seed(2), codec, (63,), 7)
    assert_close(unpack(Delta((63,), (Dense((63,), codes),))), numbers, torch.float32, "vector")


def test_segments_join_neighbours_and_index_scattered_rows():
    segments = Segments.of([2, 0, 1, 3, 1], [1, 0, 1, BASE, 1])
    assert segments.offsets.tolist() == [0, 3, 6, 7]
    assert segments.slots.tolist() == [1, BASE, 1]
    assert segments.rows[1].tolist() == [0, 1, 2, 6]
    assert segments.slot_of_row().tolist() == [1, 1, 1, -1, -1, -1, 1]


def test_an_unknown_backend_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match=r"'cuda'.*reference"):
        dispatch.backend("cuda")


@backends
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_whole_variant_swaps_in_and_leaves_no_trace(backend, dtype):
    rng = torch.Generator().manual_seed(9)
    kinds = (["sparse"], ["low_rank"], ["sparse"], ["rows"], ["sparse", "dense"], ["sparse"])
    pairs = [random_delta(rng, kind, 70 + i, 40, 16, "int2") for i, kind in enumerate(kinds)]
    vector = Delta((33,), (Dense((33,), float_codes(torch.randn(33, generator=rng))),))
    deltas = [*(delta for delta, _ in pairs), vector]
    dense = [*(meaning for _, meaning in pairs), unpack(vector).double()]
    weights = [torch.randn(meaning.shape, generator=rng).to(dtype) for meaning in dense]
    before = [weight.clone() for weight in weights]
    token = backend.swap_in_all_(weights, deltas)
    for weight, old, meaning in zip(weights, before, dense, strict=True):
        assert_close(weight, old.double() + meaning, dtype, "swapped")
    backend.swap_out_all_(weights, token)
    for weight, old in zip(weights, before, strict=True):
        assert torch.equal(weight.view(torch.uint8), old.view(torch.uint8))


@backends
@pytest.mark.parametrize("heads", [(), (3,)], ids=["rows", "rows and heads"])
@pytest.mark.parametrize("width", [1, 16, 33, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_takes_each_rows_own_vector(backend, heads, width, dtype):
    rng = torch.Generator().manual_seed(7)
    x, table = torch.randn(5, *heads, width, generator=rng).to(dtype), torch.randn(4, width, generator=rng).to(dtype)
    places = torch.tensor([0, 3, 1, 1, 2])
    for offset in (0.0, 1.0):
        normal = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
        own = (table[places].double() + offset).view(5, *[1] * len(heads), width)
        assert_close(backend.rms_norm(x, table, places, 1e-5, offset), own * normal, dtype, "own vectors")
        same = (table[0].double() + offset) * normal
        assert_close(backend.rms_norm(x, table, None, 1e-5, offset), same, dtype, "the base's vector")


@pytest.mark.parametrize("name", [name for name in dispatch.BACKENDS if name.startswith("cpu")])
def test_a_norm_whose_places_are_no_entries_is_refused(name):
    backend, x = dispatch.BACKENDS[name], torch.ones(2, 8)
    with pytest.raises(ValueError, match="slot"):
        backend.rms_norm(x, torch.ones(3, 8), torch.tensor([0, 3]), 1e-5, 0.0)
    with pytest.raises(ValueError, match="does not fit"):
        backend.rms_norm(x, torch.ones(3, 9), None, 1e-5, 0.0)
