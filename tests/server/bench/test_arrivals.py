import numpy as np
import pytest

from deltaserve.server.bench.arrivals import arrivals


def intervals(burstiness: float) -> np.ndarray:
    return np.diff(arrivals(40_000, rate=5.0, burstiness=burstiness, seed=3), prepend=0.0)


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (100.0, 0.1)])
def test_rate_holds_and_burstiness_says_how_regular(burstiness: float, variation: float) -> None:
    """A gamma distribution of shape k has the coefficient of variation 1 / sqrt(k): 1 for a Poisson process."""
    found = intervals(burstiness)
    assert found.mean() == pytest.approx(0.2, rel=0.05)
    assert found.std() / found.mean() == pytest.approx(variation, rel=0.05)


def test_poisson_process_has_exponential_intervals() -> None:
    assert np.mean(intervals(1.0) > 0.2) == pytest.approx(np.exp(-1), abs=0.01)


def test_same_seed_same_arrivals_in_order() -> None:
    due = arrivals(50, 10.0, 0.5, seed=1)
    assert due == sorted(due) == arrivals(50, 10.0, 0.5, seed=1) != arrivals(50, 10.0, 0.5, seed=2)
