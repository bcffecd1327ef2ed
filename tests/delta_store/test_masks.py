"""Seeded masks: exact counts, exact probabilities, and the same draw on every machine."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaserve.delta_store.codec import masks
from deltaserve.delta_store.codec.masks import uniform_columns, uniform_factors, weighted_columns
from deltaserve.delta_store.codec.philox import key_for, philox
from deltaserve.delta_store.errors import OptionError
from deltaserve.kernels.cpu import columns as compiled

WIDTHS = st.sampled_from([1, 2, 63, 64, 133])
WEIGHT = st.integers(0, 255).map(lambda code: (16 + (code & 15)) << (code >> 4))


def frequencies(columns: Tensor, width: int) -> Tensor:
    """float64 ``[width]``: the share of blocks that keep each column."""
    return torch.bincount(columns.flatten().long(), minlength=width).double() / len(columns)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter: str, key: str, words: str) -> None:
    """The known answers for philox4x32, 10 rounds, that the authors' library Random123 is tested with."""
    counters = np.array([[int(word, 16) for word in counter.split()]] * 2, np.uint32)
    first, second = (int(word, 16) for word in key.split())
    for row in philox(counters, (first, second)):
        assert " ".join(f"{word:08x}" for word in row) == words


def test_the_key_depends_on_seed_and_name() -> None:
    assert key_for(1, "a") == (0xC82161AE, 0xF655A58B)
    assert len({key_for(1, "a"), key_for(2, "a"), key_for(1, "b")}) == 3


def test_uniform_columns_are_the_same_everywhere() -> None:
    """Checked against a plain scalar implementation."""
    assert uniform_columns(7, "model.layers.0.mlp.up_proj.weight", 4, 20, 6).tolist() == [
        [0, 4, 7, 12, 14, 18],
        [0, 3, 6, 10, 14, 18],
        [1, 4, 6, 12, 15, 17],
        [2, 4, 6, 10, 13, 19],
    ]


def test_weighted_columns_are_the_same_everywhere() -> None:
    weights = [20, 16, 31, 32, 48, 500, 16, 40]
    columns, factors = weighted_columns(torch.tensor(weights), 7, "w", 5, 4)
    assert columns.tolist() == [[2, 4, 5, 7], [0, 3, 4, 5], [1, 3, 5, 6], [2, 4, 5, 7], [0, 3, 4, 5]]
    total, rest = 203, 3
    assert factors.tolist() == pytest.approx([1 if w == 500 else total / (rest * w) for w in weights])


@given(seed=st.integers(0, 2**63 - 1), width=WIDTHS, data=st.data())
def test_uniform_columns_lie_one_in_each_stratum(seed: int, width: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, width))
    columns = uniform_columns(seed, "w", 9, width, kept).long()
    i = torch.arange(kept)
    assert columns.shape == (9, kept)
    assert (columns >= i * width // kept).all()
    assert (columns < (i + 1) * width // kept).all()


@pytest.mark.parametrize(("width", "kept"), [(20, 6), (63, 7), (64, 64), (133, 1)])
def test_a_uniform_factor_is_the_inverse_of_the_probability(width: int, kept: int) -> None:
    blocks = 20_000
    probabilities = 1 / uniform_factors(width, kept).double()
    error = frequencies(uniform_columns(3, "w", blocks, width, kept), width) - probabilities
    assert probabilities.sum().item() == pytest.approx(kept)
    assert (error.abs() <= 5 * (probabilities * (1 - probabilities) / blocks).sqrt()).all()


@given(seed=st.integers(0, 2**63 - 1), width=WIDTHS, data=st.data())
def test_weighted_columns_are_distinct_and_ascending(seed: int, width: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, width))
    weights = torch.tensor(data.draw(st.lists(WEIGHT, min_size=width, max_size=width)))
    columns, factors = weighted_columns(weights, seed, "w", 9, kept)
    assert columns.shape == (9, kept)
    assert columns.dtype == torch.int32
    assert (columns.diff(dim=1) > 0).all()
    assert columns.min() >= 0
    assert columns.max() < width
    assert (1 / factors.double()).sum().item() == pytest.approx(kept)
    for column in (factors == 1).nonzero().flatten():
        assert (columns == column).any(1).all()


@given(width=st.sampled_from([2, 63, 133]), data=st.data())
def test_certain_columns_are_those_whose_probability_would_reach_one(width: int, data: st.DataObject) -> None:
    """Against the definition: settle all columns with ``w * rest >= T``, and again with what is left, until none is."""
    kept = data.draw(st.integers(1, width))
    weights = data.draw(st.lists(WEIGHT, min_size=width, max_size=width))
    certain: set[int] = set()
    while True:
        total, rest = sum(w for j, w in enumerate(weights) if j not in certain), kept - len(certain)
        settled = {j for j, w in enumerate(weights) if j not in certain and w * rest >= total} if rest else set()
        if not settled:
            break
        certain |= settled
    factors = weighted_columns(torch.tensor(weights), 0, "w", 1, kept)[1]
    expected = [1.0 if j in certain else total / (rest * w) for j, w in enumerate(weights)]
    assert factors.tolist() == torch.tensor(expected, dtype=torch.float64).float().tolist()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), width=st.sampled_from([5, 63]), data=st.data())
def test_weighted_columns_are_kept_with_their_probability(seed: int, width: int, data: st.DataObject) -> None:
    blocks = 20_000
    kept = data.draw(st.integers(1, width))
    weights = torch.tensor(data.draw(st.lists(WEIGHT, min_size=width, max_size=width)))
    columns, factors = weighted_columns(weights, seed, "w", blocks, kept)
    probabilities = 1 / factors.double()
    error = frequencies(columns, width) - probabilities
    deviation = (probabilities * (1 - probabilities) / blocks).sqrt()
    assert (error.abs() <= 6 * deviation + 12 / blocks).all(), (
        "Bernstein's bound: counts of rare columns are not normal"
    )


@pytest.mark.parametrize(("weights", "kept"), [([1, 1, 1, 1], 3), ([1, 2, 3, 1, 4], 2), ([9, 1, 2, 3], 3)])
def test_small_weights_are_exact_too(weights: list[int], kept: int) -> None:
    """Where the line is short, points often fall on the border between two columns: it belongs to the second."""
    columns, factors = weighted_columns(torch.tensor(weights), 5, "w", 50_000, kept)
    assert (frequencies(columns, len(weights)) - 1 / factors.double()).abs().max() < 0.012


def test_equal_weights_give_equal_probabilities() -> None:
    columns, factors = weighted_columns(torch.full((20,), 16), 1, "w", 4, 6)
    assert factors.tolist() == torch.full((20,), 20 / 6).tolist()
    assert (columns.diff(dim=1) >= 3).all()


def test_a_draw_does_not_depend_on_how_much_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.arange(16, 116)
    whole = uniform_columns(1, "w", 50, 100, 9), weighted_columns(weights, 1, "w", 50, 9)[0]
    monkeypatch.setattr(masks, "DRAWS_AT_ONCE", 30)
    assert uniform_columns(1, "w", 50, 100, 9).equal(whole[0])
    assert weighted_columns(weights, 1, "w", 50, 9)[0].equal(whole[1])
    assert len({tuple(row) for row in whole[0].tolist()}) == 50, "blocks have their own masks"


@pytest.mark.parametrize("kept", [0, 11, -1])
def test_kept_out_of_range_is_refused(kept: int) -> None:
    with pytest.raises(OptionError, match=f"{kept} columns"):
        uniform_columns(0, "w", 1, 10, kept)
    with pytest.raises(OptionError, match=f"{kept} columns"):
        weighted_columns(torch.full((10,), 16), 0, "w", 1, kept)


def test_weights_that_would_overflow_are_refused() -> None:
    largest = ((1 << 62) - 1) // (5 * 4)
    weighted_columns(torch.full((5,), largest), 0, "w", 2, 4)
    with pytest.raises(OptionError, match="64-bit"):
        weighted_columns(torch.full((5,), largest + 1), 0, "w", 2, 4)
    with pytest.raises(OptionError, match="weight is 0"):
        weighted_columns(torch.tensor([1, 0]), 0, "w", 2, 1)


@given(seed=st.integers(0, 2**63 - 1), width=st.one_of(WIDTHS, st.integers(1, 300)), data=st.data())
def test_compiled_draws_are_the_same_number_for_number(seed: int, width: int, data: st.DataObject) -> None:
    kept, blocks = data.draw(st.integers(1, width)), data.draw(st.integers(1, 7))
    kinds = st.one_of(WEIGHT, st.integers(1, 3), st.integers(1, ((1 << 62) - 1) // (width * kept)))
    one_kind = data.draw(st.sampled_from([WEIGHT, st.integers(1, 3), kinds]))
    weights = torch.tensor(data.draw(st.lists(one_kind, min_size=width, max_size=width)))
    key = key_for(seed, "w")
    assert compiled.uniform_columns(key, blocks, width, kept).equal(uniform_columns(seed, "w", blocks, width, kept))
    columns, factors = compiled.weighted_columns(weights, key, blocks, kept)
    expected, expected_factors = weighted_columns(weights, seed, "w", blocks, kept)
    assert columns.equal(expected)
    assert factors.view(torch.int32).equal(expected_factors.view(torch.int32))


@pytest.mark.parametrize(("width", "kept", "blocks"), [(576, 12, 96), (1536, 31, 36), (70_000, 70, 9), (4096, 205, 64)])
@pytest.mark.parametrize("spread", [0, 3, 15])
def test_compiled_draws_of_real_layers(width: int, kept: int, blocks: int, spread: int) -> None:
    """``spread`` 15: a few columns are so heavy that they are kept in every block."""
    rng = torch.Generator().manual_seed(width)
    codes = torch.randint(0, 16, (width,), generator=rng) | torch.randint(0, spread + 1, (width,), generator=rng) << 4
    weights = (16 + (codes & 15)) << (codes >> 4)
    weights[: kept // 3] *= 1 + 99 * (spread == 15)
    columns, factors = compiled.weighted_columns(weights, key_for(4, "w"), blocks, kept)
    expected, expected_factors = weighted_columns(weights, 4, "w", blocks, kept)
    assert columns.equal(expected)
    assert factors.equal(expected_factors)
    assert compiled.uniform_columns(key_for(4, "w"), blocks, width, kept).equal(
        uniform_columns(4, "w", blocks, width, kept)
    )


def test_weights_that_cannot_be_drawn_from_are_refused_by_the_compiled_draw_too() -> None:
    largest = ((1 << 62) - 1) // (5 * 4)
    compiled.weighted_columns(torch.full((5,), largest), (1, 2), 2, 4)
    for weights, kept in ((torch.full((5,), largest + 1), 4), (torch.tensor([1, 0]), 1), (torch.tensor([1, -5]), 1)):
        with pytest.raises(ValueError, match="cannot be drawn"):
            compiled.weighted_columns(weights, (1, 2), 2, kept)
