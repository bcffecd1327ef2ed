"""The Triton backend against the dense oracle: on a GPU where there is one, else in Triton's interpreter.

Shapes are small because the interpreter takes a tenth of a second for a hundred products.
"""

import pytest
import torch
from dense_oracle import (
    BLOCKS,
    CODECS,
    MIXES,
    TOLERANCE,
    assert_close,
    random_codes,
    random_delta,
    random_segments,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.kernels import dispatch, reference
from deltaserve.kernels.codes import float_codes
from deltaserve.kernels.parts import Delta, Dense, Sparse
from deltaserve.kernels.segments import BASE, Segments
from deltaserve.kernels.weights import Weight

pytest.importorskip("triton")

TRITON = dispatch.backend("triton")
KINDS = ("sparse", "low_rank", "dense", "rows")
cases = given(
    seed=st.integers(0, 2**31),
    out=st.sampled_from((1, 16, 35)),
    width=st.sampled_from((1, 3, 63, 70)),
    block=st.sampled_from(BLOCKS),
    codec=st.sampled_from(CODECS),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=2, unique=True),
    mix=st.sampled_from(MIXES),
    dtype=st.sampled_from(list(TOLERANCE)),
)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(3)


def on_device(tensor):
    """A copy, also where the device is the CPU."""
    return tensor.to(TRITON.device, copy=True)


def linear(y, x, bank, segments):
    """``delta_linear_`` on the device, back as a new tensor."""
    result = on_device(y)
    TRITON.delta_linear_(result, x.to(TRITON.device), bank, segments)
    return result.cpu()


def embedding(y, ids, bank, segments):
    result = on_device(y)
    TRITON.delta_embedding_(result, ids.to(TRITON.device), bank, segments)
    return result.cpu()


def two_variants(rng, kinds, out, width, block, codec):
    """A bank of three slots, the last of which leaves the layer as it is, and their dense meaning."""
    pairs = [random_delta(rng, kinds, out, width, block, codec) for _ in range(2)]
    dense = [*(meaning for _, meaning in pairs), torch.zeros(out, width, dtype=torch.float64)]
    return [*(TRITON.prepare(delta) for delta, _ in pairs), None], dense


@settings(max_examples=25, deadline=None)
@cases
def test_delta_linear_equals_the_dense_product(seed, out, width, block, codec, kinds, mix, dtype):
    rng = torch.Generator().manual_seed(seed)
    bank, dense = two_variants(rng, kinds, out, width, block, codec)
    segments, owner = random_segments(mix, 5, 3, seed)
    x = torch.randn(len(owner), width * 2, generator=rng).to(TRITON.device, dtype)[:, ::2]  # not contiguous
    y = torch.randn(len(owner), out + 2, generator=rng).to(dtype)  # wider than the delta: its last columns stay
    expected = y.double()
    for row, slot in enumerate(owner):
        if slot != BASE:
            expected[row, :out] += dense[slot] @ x[row].cpu().double()

    got = linear(y, x, bank, segments)

    touched = torch.tensor([slot != BASE for slot in owner], dtype=torch.bool)
    assert torch.equal(got[~touched], y[~touched])
    assert torch.equal(got[:, out:], y[:, out:])
    if touched.any():
        assert_close(got[touched, :out], expected[touched, :out], dtype, "y")


@settings(max_examples=25, deadline=None)
@cases
def test_delta_embedding_equals_the_dense_rows(seed, out, width, block, codec, kinds, mix, dtype):
    rng = torch.Generator().manual_seed(seed)
    bank, dense = two_variants(rng, kinds, out, width, block, codec)
    segments, owner = random_segments(mix, 5, 3, seed)
    ids = torch.randint(0, out, (len(owner),), generator=rng)
    y = torch.randn(len(owner), width, generator=rng).to(dtype)
    expected = y.double()
    for row, slot in enumerate(owner):
        if slot != BASE:
            expected[row] += dense[slot][ids[row]]

    got = embedding(y, ids, bank, segments)

    touched = torch.tensor([slot != BASE for slot in owner], dtype=torch.bool)
    assert torch.equal(got[~touched], y[~touched])
    if touched.any():
        assert_close(got[touched], expected[touched], dtype, "y")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("block", BLOCKS)
def test_one_few_and_many_rows_for_every_codec_and_block(codec, block, rng):
    delta, dense = random_delta(rng, ["sparse"], 20, 40, block, codec)
    x, y = torch.randn(19, 40, generator=rng), torch.zeros(19, 20)
    for rows in (1, 19):  # 19 are a full tile and one of three rows
        got = linear(y[:rows], x[:rows], [TRITON.prepare(delta)], Segments.of([rows], [0]))
        assert_close(got, x[:rows].double() @ dense.T, torch.float32, "y")


def test_layers_add_deltas_and_biases_to_the_bases_product(rng):
    (first, dense), (second, _) = (random_delta(rng, ["sparse"], 22, 24, 4, "int4") for _ in range(2))
    weights = [on_device(torch.randn(out, 24, generator=rng)) for out in (20, 22)]
    layers = TRITON.layers([Weight(weights[0], bias=on_device(torch.ones(20))), Weight(weights[1])], slots=3)
    layers.install_bias(0, 1, torch.arange(20.0))  # a slot that changes a bias alone
    layers.install(1, 0, TRITON.prepare(second))
    layers.install_bias(1, 0, torch.arange(20.0))  # two rows of its delta are added vocabulary
    layers.install(1, 0, TRITON.prepare(first))
    layers.install_bias(1, 2, torch.ones(22))
    layers.install_bias(1, 2, None)
    x, segments = on_device(torch.randn(7, 24, generator=rng)), Segments.of([1, 2, 1, 3], [BASE, 0, 2, 1])

    ys = TRITON.linear(x, layers, segments)
    wide = torch.full((7, 24), -torch.inf, device=TRITON.device)
    wide[:, 22:] = 5
    TRITON.linear_(wide[:, :24], x, TRITON.layers([Weight(weights[1])], slots=3), segments)

    expected = [x.cpu().double() @ weight.cpu().double().T for weight in weights]
    assert_close(wide[:, :22].cpu(), expected[1], torch.float32, "y of the base alone")
    assert (wide[:, 22:] == 5).all()
    expected[0] += 1
    expected[0][4:] += torch.arange(20)
    expected[1][1:3] += x[1:3].cpu().double() @ dense.T
    expected[1][1:3, :20] += torch.arange(20)
    for y, wanted in zip(ys, expected, strict=True):
        assert_close(y.cpu(), wanted, torch.float32, "y")
    assert all(
        torch.equal(y, base)
        for y, base in zip(TRITON.linear(x, layers, None), map(layers.product, (0, 1), (x, x)), strict=True)
    )
    with pytest.raises(ValueError, match="A bias delta of 23 rows beside a weight delta of 22"):
        layers.install_bias(1, 0, torch.ones(23))


def test_inputs_wider_than_a_16_bit_column(rng):
    width = (1 << 16) + 100
    columns = torch.tensor([[5, width - 1], [0, width - 2]], dtype=torch.int32)
    values = float_codes(torch.tensor([1.0, 2.0, 3.0, 4.0]), "bf16", (2, 2, 1))
    delta = Delta((2, width), (Sparse((2, width), columns, values, torch.full((width,), 2.0)),))
    x = torch.randn(3, width, generator=rng)
    got = linear(torch.zeros(3, 2), x, [TRITON.prepare(delta)], Segments.of([3], [0]))
    expected = torch.stack([2 * x[:, 5] + 4 * x[:, -1], 6 * x[:, 0] + 8 * x[:, -2]], 1)
    assert_close(got, expected.double(), torch.float32, "y")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swapping_in_and_out_in_any_order_leaves_the_base_bit_identical(dtype, rng):
    original = torch.randn(35, 20, generator=rng).to(dtype)
    weight = on_device(original)
    for codec, block in zip(CODECS, BLOCKS, strict=True):
        for kinds in (["sparse"], ["dense"], ["rows"], list(KINDS)):
            delta, dense = random_delta(rng, kinds, 35, 20, block, codec)
            token = TRITON.swap_in_(weight, delta)
            assert_close(weight.cpu(), original.double() + dense, dtype, f"weight with {kinds} {codec}")
            TRITON.swap_out_(weight, token)
            assert torch.equal(weight.cpu().view(torch.uint8), original.view(torch.uint8))


@pytest.mark.parametrize("codec", CODECS)
def test_a_swapped_weight_is_bit_for_bit_the_references(codec, rng):
    delta, _ = random_delta(rng, ["sparse"], 35, 20, 16, codec)
    expected = torch.randn(35, 20, generator=rng)
    weight = on_device(expected)
    TRITON.swap_in_(weight, delta)
    reference.swap_in_(expected, delta)
    assert torch.equal(weight.cpu(), expected)


def test_a_swap_that_fails_half_way_through_a_model_is_undone(rng):
    weights = [on_device(torch.randn(16, 20, generator=rng).bfloat16()) for _ in range(3)]
    before = [weight.clone() for weight in weights]
    deltas = [random_delta(rng, [kind], 16, 20, 4, "int4")[0] for kind in ("sparse", "dense")]
    too_wide, _ = random_delta(rng, ["sparse"], 16, 21, 4, "int4")
    tokens = []

    def swap_all_in():
        for weight, delta in zip(weights, [*deltas, too_wide], strict=True):
            tokens.append(TRITON.swap_in_(weight, delta))

    with pytest.raises(ValueError, match="contiguous weight"):
        swap_all_in()
    assert len(tokens) == 2
    for weight, token in zip(weights, tokens, strict=False):
        TRITON.swap_out_(weight, token)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(weights, before, strict=True))


def test_a_vector_is_swapped_too(rng):
    codes, numbers = random_codes(rng, "int8", (63,), 16)
    vector = on_device(torch.ones(63))
    token = TRITON.swap_in_(vector, Delta((63,), (Dense((63,), codes),)))
    assert_close(vector.cpu(), numbers + 1, torch.float32, "vector")
    TRITON.swap_out_(vector, token)
    assert torch.equal(vector.cpu(), torch.ones(63))
