"""The base's own product, alone, of several layers at once, and with the deltas of a batch in the same pass."""

import pytest
import torch
from dense_oracle import BLOCKS, CODECS, MIXES, SIZES, TOLERANCE, assert_close, random_delta, random_segments
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.kernels import dispatch
from deltaserve.kernels.cpu.products import PRODUCTS, choose, packed, with_copy
from deltaserve.kernels.segments import BASE, Segments
from deltaserve.kernels.weights import Weight, quantised

CPU = {name: one for name, one in dispatch.BACKENDS.items() if name.startswith("cpu")}
backends = pytest.mark.parametrize("backend", dispatch.BACKENDS.values(), ids=dispatch.BACKENDS)
cpu = pytest.mark.parametrize("backend", CPU.values(), ids=CPU)
ROWS = (1, 2, 3, 4, 5, 8, 16, 17, 24, 25, 31, 130)


def random_weight(rng: torch.Generator, kind: str, out: int, width: int, bias: bool) -> Weight:
    values = torch.randn(out, width, generator=rng)
    own_bias = torch.randn(out, generator=rng) if bias else None
    if kind == "int8":
        return quantised(values, own_bias)
    dtype = getattr(torch, kind)
    return Weight(values.to(dtype), None, None if own_bias is None else own_bias.to(dtype))


def expected_product(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """float64"""
    y = x.double() @ weight.dense().double().T
    return y if weight.bias is None else y + weight.bias.double()


def error_of(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, root of the mean of squares; sums that cancel count by their terms' size."""
    return float((y.double() - expected).norm() / (expected.norm() + expected.numel() ** 0.5))


@cpu
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    out=st.sampled_from((*SIZES, 200)),
    width=st.sampled_from((*SIZES, 577)),
    rows=st.sampled_from(ROWS),
    kind=st.sampled_from(("float32", "bfloat16", "int8")),
    dtype=st.sampled_from(list(TOLERANCE)),
    bias=st.booleans(),
)
def test_the_own_product_equals_the_dense_one(backend, seed, out, width, rows, kind, dtype, bias):
    rng = torch.Generator().manual_seed(seed)
    weight = random_weight(rng, kind, out, width, bias)
    x = (torch.randn(rows, width, generator=rng) / width**0.5).to(dtype)
    y = torch.full((rows, out + 3), 7.0, dtype=dtype)
    backend.product_of(weight)(x, weight, y[:, :out])
    assert error_of(y[:, :out], expected_product(x, weight)) <= TOLERANCE[dtype]
    assert bool((y[:, out:] == 7).all())


@cpu
def test_a_row_does_not_depend_on_the_rows_beside_it(backend):
    rng = torch.Generator().manual_seed(0)
    for kind in ("float32", "bfloat16", "int8"):
        weight = random_weight(rng, kind, 203, 577, True)
        x = torch.randn(130, 577, generator=rng)
        whole = torch.empty(130, 203)
        backend.product_of(weight)(x, weight, whole)
        for rows in ROWS:
            y = torch.empty(rows, 203)
            backend.product_of(weight)(x[:rows], weight, y)
            assert torch.equal(y, whole[:rows]), (kind, rows)


@backends
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    outs=st.lists(st.sampled_from(SIZES), min_size=1, max_size=3),
    width=st.sampled_from(SIZES),
    block=st.sampled_from(BLOCKS),
    codec=st.sampled_from(CODECS),
    kinds=st.lists(st.sampled_from(("sparse", "low_rank", "dense", "rows")), min_size=1, max_size=2, unique=True),
    mix=st.sampled_from(MIXES),
    slots=st.integers(1, 4),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_layers_with_one_input_equal_base_plus_deltas_plus_biases(
    backend, seed, outs, width, block, codec, kinds, mix, slots, dtype
):
    rng = torch.Generator().manual_seed(seed)
    kind = "float32" if dtype == torch.float16 else str(dtype).removeprefix("torch.")
    weights = [random_weight(rng, kind, out, width, bias=True) for out in outs]
    layers = backend.layers(weights, slots)
    segments, owner = random_segments(mix, 6, slots, seed)
    x = torch.randn(len(owner), width, generator=rng).to(dtype)
    expected = [expected_product(x, weight) for weight in weights]
    for layer, out in enumerate(outs):
        for slot in range(slots):
            delta, dense = random_delta(rng, kinds, out, width, block, codec)
            bias = torch.randn(out, generator=rng)
            if slot % 2 == 0:
                layers.install(layer, slot, backend.prepare(delta))
            if slot % 3 != 1:
                layers.install_bias(layer, slot, bias)
            for row in (row for row, one in enumerate(owner) if one == slot):
                expected[layer][row] += dense @ x[row].double() if slot % 2 == 0 else 0
                expected[layer][row] += bias.double() if slot % 3 != 1 else 0
    ys = backend.linear(x, layers, segments)
    plain = backend.linear(x, layers, None)
    own = torch.tensor([slot == BASE for slot in owner], dtype=torch.bool)
    for y, base, want in zip(ys, plain, expected, strict=True):
        assert y.shape == want.shape
        assert y.is_contiguous()
        assert error_of(y, want) <= 2 * TOLERANCE[dtype]
        assert torch.equal(y[own], base[own])
    for slot in range(slots):
        for layer in range(len(outs)):
            layers.install(layer, slot, None)
            layers.install_bias(layer, slot, None)
    for y, base in zip(backend.linear(x, layers, segments), plain, strict=True):
        assert torch.equal(y, base)


@cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [60, 700])  # a wide x shortens the passes
def test_a_long_batch_gets_base_and_deltas_in_several_passes(backend, width, dtype):
    rng = torch.Generator().manual_seed(4)
    weight = random_weight(rng, str(dtype).removeprefix("torch."), 69, width, bias=False)
    layers, dense = backend.layers([weight], 3), []
    several = ["sparse", "low_rank", "rows", "dense"]
    for slot, (kinds, block) in enumerate(((["sparse"], 16), (several, 32), (["sparse"], 4))):
        delta, meaning = random_delta(rng, kinds, 69, width, block, "int2")
        layers.install(0, slot, backend.prepare(delta))
        dense.append(meaning)
    lengths, owners = [1, 40, 70, 5, 2, 64, 30, 1, 9], [0, 1, 2, BASE, 1, 0, 1, 2, 0]
    owner = [slot for length, slot in zip(lengths, owners, strict=True) for _ in range(length)]
    x = (torch.randn(len(owner), width, generator=rng) / width**0.5).to(dtype)
    expected = expected_product(x, weight)
    for row, slot in enumerate(owner):
        expected[row] += 0 if slot == BASE else dense[slot] @ x[row].double()
    (y,) = backend.linear(x, layers, Segments.of(lengths, owners))
    assert_close(y, expected, dtype, "y")


@backends
def test_a_wider_y_keeps_its_columns_and_gets_the_added_rows_of_a_delta(backend):
    rng = torch.Generator().manual_seed(3)
    weight = random_weight(rng, "float32", 20, 9, bias=False)
    layers = backend.layers([weight], 2)
    delta, dense = random_delta(rng, ["sparse"], 25, 9, 4, "int8")
    layers.install(0, 1, backend.prepare(delta))
    x, y = torch.randn(3, 9, generator=rng), torch.full((3, 30), 5.0)
    backend.linear_(y, x, layers, Segments.of([2, 1], [BASE, 1]))
    assert_close(y[:2, :20], expected_product(x[:2], weight), torch.float32, "base")
    assert bool((y[:2, 20:] == 5).all())
    assert bool((y[2, 25:] == 5).all())
    assert_close(y[2, :20], expected_product(x[2:], weight)[0] + dense[:20] @ x[2].double(), torch.float32, "variant")
    assert_close(y[2, 20:25], 5 + dense[20:] @ x[2].double(), torch.float32, "added rows")


@cpu
def test_a_swap_into_the_weight_counts(backend):
    rng = torch.Generator().manual_seed(5)
    weight = random_weight(rng, "float32", 64, 48, bias=False)
    layers = backend.layers([weight], 1)
    delta, dense = random_delta(rng, ["sparse"], 64, 48, 16, "int4")
    x = torch.randn(4, 48, generator=rng)
    before = backend.linear(x, layers, None)[0].clone()
    token = backend.swap_in_(weight.values, delta)
    assert_close(backend.linear(x, layers, None)[0], before.double() + x.double() @ dense.T, torch.float32, "swapped")
    backend.swap_out_(weight.values, token)
    assert torch.equal(backend.linear(x, layers, None)[0], before)


@pytest.mark.parametrize("product", [*PRODUCTS, packed], ids=lambda product: product.__name__)
@pytest.mark.parametrize("bias", [False, True])
def test_torchs_products_are_the_same_product(product, bias):
    rng = torch.Generator().manual_seed(1)
    weight = with_copy(random_weight(rng, "float32", 30, 17, bias))
    x, y = torch.randn(5, 17, generator=rng), torch.empty(5, 33)
    product(x, weight, y[:, :30])
    assert_close(y[:, :30], expected_product(x, weight), torch.float32, "y")


def test_the_choice_is_the_fastest_and_prefers_the_own_product(monkeypatch):
    now = [0.0]
    seconds = {
        "own": {1: 1.0, 4: 1.0, 16: 3.0},
        "plain": {1: 0.95, 4: 0.5, 16: 2.0},
        "transposed": {1: 2, 4: 2, 16: 1.0},
    }

    def taking(name):
        def product(x, weight, y):
            now[0] += seconds[name].get(len(x), 1.0)

        product.__name__ = name
        return product

    own, plain, transposed = taking("own"), taking("plain"), taking("transposed")
    monkeypatch.setattr("deltaserve.kernels.cpu.products.PRODUCTS", (plain, transposed))
    monkeypatch.setattr("deltaserve.kernels.cpu.products.ROWS", (1, 4, 16))
    monkeypatch.setattr("deltaserve.kernels.cpu.products.CACHE_BYTES", 1)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert choose([Weight(torch.ones(3, 2))], lambda weight: own) == ((1, None), (4, plain), (16, transposed))


@cpu
def test_weights_are_kept_twice_only_when_asked_for(backend, monkeypatch):
    monkeypatch.setattr("deltaserve.kernels.cpu.products.ADVANTAGE", 1e9)  # anything is faster than the own product
    monkeypatch.setattr("deltaserve.kernels.cpu.products.PRODUCTS", ())
    monkeypatch.setattr(backend, "_choices", {})
    rng = torch.Generator().manual_seed(4)
    weights = [random_weight(rng, "float32", out, 31, True) for out in (17, 8)]
    x = torch.randn(5, 31, generator=rng)
    layers = backend.layers(weights, 1, copies=True)
    assert {product for _, product in layers.products} == {packed}
    for y, weight in zip(backend.linear(x, layers, None), weights, strict=True):
        assert_close(y, expected_product(x, weight), torch.float32, "y")
    monkeypatch.undo()
    assert all(weight.packed is None for weight in backend.layers(weights, 1).weights)


@cpu
def test_weights_that_the_kernels_cannot_read_are_left_to_torch(backend):
    weight = Weight(torch.randn(6, 4).half())
    layers = backend.layers([weight], 1)
    x = torch.randn(3, 4).half()
    assert_close(backend.linear(x, layers, None)[0], expected_product(x, weight), torch.float16, "y")


@cpu
@pytest.mark.parametrize("product", [None, *PRODUCTS])
def test_an_input_of_another_width_is_refused(backend, product):
    layers = backend.layers([Weight(torch.randn(6, 4))], 1)
    layers.products = ((1, product),)
    with pytest.raises(ValueError, match="not as wide"):
        backend.linear(torch.randn(2, 5), layers, None)


def test_quantised_rows_keep_their_largest_value_and_zeros():
    weight = quantised(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(weight.dense(), torch.tensor([[1.0, -2.0, 0.5], [0, 0, 0]]), atol=2 / 254, rtol=0)
    assert weight.dense()[0, 1] == -2
    assert weight.dense()[1].abs().sum() == 0
