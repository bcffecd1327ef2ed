import pytest

from deltaserve.server.bench.client import Outcome, Record
from deltaserve.server.bench.statistics import by_model, distribution, figures


def record(model: str = "m", start: float = 0.0, outcome: Outcome = Outcome.COMPLETED, tokens: int = 3) -> Record:
    """Three events with text, at 0.5, 0.6 and 0.8 s."""
    texts = tuple(start + wait for wait in (0.5, 0.6, 0.8))
    return Record(model, outcome, start, start + 1.0, texts, tokens, reason="" if outcome == "completed" else "broke")


def test_distribution_interpolates_between_ranks() -> None:
    found = distribution(n / 1000 for n in range(1, 101))
    assert found is not None
    values = (found.samples, found.mean, found.median, found.p95, found.p99, found.p99_is_rough)
    assert values == pytest.approx((100, 50.5, 50.5, 95.05, 99.01, False))


def test_p99_of_fewer_than_a_hundred_samples_is_marked() -> None:
    found = distribution([0.001] * 99)
    assert found is not None
    assert found.p99_is_rough


def test_nothing_has_no_distribution() -> None:
    assert distribution([]) is None


def test_record_times() -> None:
    one = record(tokens=3)
    assert one.ttft == pytest.approx(0.5)
    assert one.gaps == pytest.approx([0.1, 0.2])
    assert one.e2e == pytest.approx(1.0)
    assert one.tpot == pytest.approx(0.25)
    assert record(tokens=1).tpot is None


def test_figures_count_completed_requests_only() -> None:
    found = figures([record(start=0.0), record(start=1.0), record(start=50.0, outcome=Outcome.FAILED)])
    assert found.output_tokens == 6
    assert found.span_s == pytest.approx(2.0)
    assert found.tokens_per_s == pytest.approx(3.0)
    assert found.requests_per_s == pytest.approx(1.0)
    assert found.failed_share == pytest.approx(1 / 3)
    assert found.reasons == ((Outcome.FAILED, "broke", 1),)


def test_figures_of_failures_alone_are_absent_not_zero() -> None:
    found = figures([record(outcome=Outcome.TIMED_OUT)])
    assert (found.tokens_per_s, found.ttft, found.itl, found.tpot, found.e2e) == (None, None, None, None, None)
    assert found.failed_share == 1.0


def test_each_model_has_its_own_figures() -> None:
    parts = by_model([record("b"), record("a"), record("b", outcome=Outcome.EMPTY)], models=["a", "b", "unasked"])
    assert list(parts) == ["a", "b"]
    assert parts["b"].outcomes[Outcome.EMPTY] == 1
    assert parts["a"].output_tokens == 3
