"""Quantisation: unbiased scales, the best of the candidate codes, and nothing disturbed by padding or zeros."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaserve.delta_store.codec.values import quantise
from deltaserve.delta_store.errors import CheckpointError, OptionError
from deltaserve.kernels.codes import decode, unpack_bits
from deltaserve.kernels.parts import Codes

CODED = ["int8", "int4", "int2", "sign"]
BFLOAT16_ROUNDING = 2**-8
SHAPES = st.sampled_from([(1,), (63,), (133,), (1, 63), (133, 1), (63, 133), (2, 3, 4)])


def drawn(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def groups(values: Tensor, group: int) -> list[Tensor]:
    return list(values.flatten().double().split(group))


def codes_of(codes: Codes) -> list[int]:
    return [int(code) for code in unpack_bits(codes.data, codes.codec, math.prod(codes.shape))]


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    codec=st.sampled_from(CODED),
    group=st.sampled_from([1, 7, 64, 1000]),
    seed=st.integers(0, 99),
    spread=st.sampled_from([1e-18, 1e-4, 1.0, 1e15]),
)
def test_the_projection_on_the_values_is_kept(
    shape: tuple[int, ...], codec: str, group: int, seed: int, spread: float
) -> None:
    values = drawn(shape, seed, spread)
    decoded = decode(quantise(values, codec, group))
    for q, f in zip(groups(decoded, group), groups(values, group), strict=True):
        assert (q * f).sum().item() == pytest.approx((f * f).sum().item(), rel=BFLOAT16_ROUNDING)


@pytest.mark.parametrize("codec", CODED)
def test_codes_are_the_candidate_of_least_error(codec: str) -> None:
    """Against the search written out plainly, value by value."""
    candidates = {"int8": [1.0], "int4": [1, 0.85, 0.7, 0.55], "int2": [0.7, 0.8, 0.9, 1.0, 1.1, 1.25], "sign": [1.0]}
    values = drawn((3, 64), 5)
    expected = []
    for row in values.tolist():
        top = {"int8": 127, "int4": 7}.get(codec)
        start = max(map(abs, row)) / top if top else sum(map(abs, row)) / len(row)
        tried = [[nearest(v / (start * c), codec) for v in row] for c in candidates[codec]]
        errors = [
            sum((level * start * c - v) ** 2 for level, v in zip(levels, row, strict=True))
            for levels, c in zip(tried, candidates[codec], strict=True)
        ]
        expected.append(tried[errors.index(min(errors))])
    codes = quantise(values, codec, 64)
    unscaled = decode(Codes(codec, codes.shape, codes.data, torch.ones_like(codes.scales), 64))
    assert unscaled.tolist() == expected


def nearest(multiple: float, codec: str) -> float:
    match codec:
        case "sign":
            return 1.0 if multiple >= 0 else -1.0
        case "int2":
            return max(-1.5, min(1.5, round(multiple - 0.5) + 0.5))
        case "int4":
            return float(max(-7, min(7, round(multiple))))
    return float(max(-127, min(127, round(multiple))))


@pytest.mark.parametrize("codec", CODED)
def test_groups_of_zeros_decode_to_zeros(codec: str) -> None:
    values = torch.cat([torch.zeros(64), drawn((64,), 1), torch.zeros(10)])
    decoded = decode(quantise(values, codec, 64))
    assert decoded[:64].count_nonzero() == 0
    assert decoded[128:].count_nonzero() == 0
    assert decoded[64:128].count_nonzero() > 0


@pytest.mark.parametrize("codec", ["int2", "sign"])
def test_zeros_among_values_do_not_add_up(codec: str) -> None:
    values = torch.zeros(64)
    values[::2] = drawn((32,), 2)
    decoded = decode(quantise(values, codec, 64))
    assert decoded[1::2].count_nonzero() == 32, "these codecs have no zero"
    values = torch.zeros(64)
    values[0] = 1
    assert abs(decode(quantise(values, codec, 64))[2:].sum().item()) < 1e-6


@settings(max_examples=40, deadline=None)
@given(
    codec=st.sampled_from(CODED),
    block=st.sampled_from([4, 8, 16, 64]),
    kept=st.sampled_from([1, 5, 63]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_padding_rows_move_no_scale(codec: str, block: int, kept: int, seed: int, data: st.DataObject) -> None:
    padding = data.draw(st.integers(1, block - 1))
    values = drawn((3, kept, block), seed)
    loud = values.clone()
    values[-1, :, block - padding :] = 0
    loud[-1, :, block - padding :] = 1e6
    quiet_codes, loud_codes = (quantise(v, codec, 64, padding) for v in (values, loud))
    assert quiet_codes.scales.equal(loud_codes.scales)
    assert decode(quiet_codes)[:2].equal(decode(loud_codes)[:2])
    decoded = decode(quiet_codes)
    decoded[-1, :, block - padding :] = 0
    for q, f in zip(groups(decoded, 64), groups(values, 64), strict=True):
        assert (q * f).sum().item() == pytest.approx((f * f).sum().item(), rel=BFLOAT16_ROUNDING)


@pytest.mark.parametrize("codec", CODED)
@pytest.mark.parametrize("seed", range(10))
def test_padding_rows_have_no_say_in_the_codes(codec: str, seed: int) -> None:
    values = drawn((1, 1, 64), seed)
    padded, alone = quantise(values, codec, 64, padding=32), quantise(values[:, :, :32], codec, 32)
    assert padded.scales.equal(alone.scales)
    assert codes_of(padded)[:32] == codes_of(alone)


@pytest.mark.parametrize(
    ("codec", "codes", "scales"),
    [
        ("int8", [127, -64, 32, -1, 127, 0], [0.00787353515625, 0.000629425048828125]),
        ("int4", [15, 4, 10, 8, 15, 8], [0.1376953125, 0.01141357421875]),
        ("int2", [3, 1, 2, 1, 3, 1], [0.69921875, 0.05322265625]),
        ("sign", [1, 0, 1, 0, 1, 0], [0.74609375, 0.080078125]),
    ],
)
def test_codes_and_scales_are_the_same_everywhere(codec: str, codes: list[int], scales: list[float]) -> None:
    quantised = quantise(torch.tensor([1.0, -0.5, 0.25, -0.01, 0.08, 0.0]), codec, 4)
    assert (codes_of(quantised), quantised.scales.tolist()) == (codes, scales)


@pytest.mark.parametrize("codec", ["float32", "bf16"])
def test_float_codecs_round_and_scale_nothing(codec: str) -> None:
    values = drawn((5, 7), 3)
    codes = quantise(values, codec, 1)
    assert decode(codes).equal(values if codec == "float32" else values.bfloat16().float())
    assert (codes.group, len(codes.scales)) == (1, 0)


@pytest.mark.parametrize("codec", ["float32", "bf16", *CODED])
def test_a_view_is_quantised_as_what_it_shows(codec: str) -> None:
    values = drawn((40, 30), 4)
    view, copy = values.T[::2], values.T[::2].contiguous()
    assert decode(quantise(view, codec, 1)).equal(decode(quantise(copy, codec, 1)))


@pytest.mark.parametrize("codec", ["float32", "bf16", *CODED])
def test_nothing_at_all_is_quantised_to_nothing(codec: str) -> None:
    codes = quantise(torch.empty(0, 5), codec, 5)
    assert decode(codes).shape == (0, 5)


@pytest.mark.parametrize("codec", ["float32", "bf16", *CODED])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(codec: str, bad: float) -> None:
    values = drawn((70,), 6)
    values[65] = bad
    with pytest.raises(CheckpointError, match="not finite"):
        quantise(values, codec, 64)


def test_an_unknown_codec_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"'int3'.*int4"):
        quantise(torch.ones(3), "int3", 1)
