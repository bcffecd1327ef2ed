from collections import Counter

import pytest

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.bench.mix import MIXES, assign

MODELS = ["a", "b", "c", "d"]


def shares(mix: str) -> list[float]:
    counts = Counter(assign(mix, MODELS, 40_000, seed=1))
    return [counts[model] / 40_000 for model in MODELS]


def test_distinct_goes_round_the_models() -> None:
    assert assign("distinct", MODELS, 6, seed=1) == ["a", "b", "c", "d", "a", "b"]


def test_distinct_needs_no_more_models_than_are_under_way() -> None:
    assert assign("distinct", MODELS, 5, seed=1, at_once=2) == ["a", "b", "a", "b", "a"]


def test_rotation_goes_round_all_models_however_few_are_under_way() -> None:
    assert assign("rotation", MODELS, 6, seed=1, at_once=2) == ["a", "b", "c", "d", "a", "b"]


@pytest.mark.parametrize(("exponent", "first"), [(0.0, 0.25), (1.0, 0.48), (2.0, 0.702)])
def test_exponent_of_zipf(exponent: float, first: float) -> None:
    found = Counter(assign("zipf", MODELS, 40_000, seed=1, exponent=exponent))
    assert found["a"] / 40_000 == pytest.approx(first, abs=0.01)


def test_identical_asks_the_first_model_alone() -> None:
    assert assign("identical", MODELS, 3, seed=1) == ["a", "a", "a"]


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        ("uniform", [0.25, 0.25, 0.25, 0.25]),
        ("zipf", [0.48, 0.24, 0.16, 0.12]),  # 1, 1/2, 1/3, 1/4 over their sum 25/12
        ("skewed", [0.415, 0.277, 0.185, 0.123]),  # each 1.5 times the next
    ],
)
def test_popularity_follows_the_rank(mix: str, expected: list[float]) -> None:
    assert shares(mix) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("mix", MIXES)
def test_same_seed_same_requests(mix: str) -> None:
    assert assign(mix, MODELS, 50, seed=7) == assign(mix, MODELS, 50, seed=7)


def test_other_seed_other_requests() -> None:
    assert assign("uniform", MODELS, 50, seed=7) != assign("uniform", MODELS, 50, seed=8)


def test_unknown_mix_lists_the_known() -> None:
    with pytest.raises(OptionError, match=r"'gauss' is unknown.*distinct, rotation, uniform, zipf, skewed, identical"):
        assign("gauss", MODELS, 1, seed=1)


def test_no_models_is_an_error() -> None:
    with pytest.raises(OptionError, match="--models"):
        assign("uniform", [], 1, seed=1)
