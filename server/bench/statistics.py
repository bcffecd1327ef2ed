"""From records to figures. Only completed requests count in any latency or throughput."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from deltaserve.server.bench.client import Outcome, Record

PERCENTILE_METHOD = "linear interpolation between the closest ranks (Hyndman and Fan's type 7, numpy's default)"
P99_NEEDS = 100


@dataclass(frozen=True, slots=True)
class Distribution:
    """Milliseconds, all of them. ``p99_is_rough``: fewer than 100 samples, so that it is nearly the maximum."""

    samples: int
    mean: float
    median: float
    p95: float
    p99: float
    p99_is_rough: bool


@dataclass(frozen=True, slots=True)
class Figures:
    """What a set of requests came to. Rates are per second of ``span_s``; None where nothing was there to measure.

    ``reasons`` are (outcome, reason, count), the most frequent first.
    """

    outcomes: dict[Outcome, int]
    reasons: tuple[tuple[Outcome, str, int], ...]
    output_tokens: int
    tokens_estimated: bool
    span_s: float
    tokens_per_s: float | None
    requests_per_s: float | None
    ttft: Distribution | None
    itl: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())

    @property
    def failed_share(self) -> float:
        """The share of requests that did not complete, for whatever reason."""
        return 1.0 - self.outcomes[Outcome.COMPLETED] / self.requests if self.requests else 0.0


def distribution(seconds: Iterable[float]) -> Distribution | None:
    """None without samples: there is no such thing as the median of nothing."""
    samples = 1000.0 * np.fromiter(seconds, dtype=np.float64)
    if not samples.size:
        return None
    median, p95, p99 = np.percentile(samples, [50, 95, 99], method="linear")
    return Distribution(
        samples=samples.size,
        mean=float(samples.mean()),
        median=float(median),
        p95=float(p95),
        p99=float(p99),
        p99_is_rough=samples.size < P99_NEEDS,
    )


def figures(records: Sequence[Record]) -> Figures:
    """The figures of a run, or of the part of it that asked one model."""
    completed = [record for record in records if record.outcome is Outcome.COMPLETED]
    counts = Counter(record.outcome for record in records)
    reasons = Counter((record.outcome, record.reason) for record in records if record.outcome is not Outcome.COMPLETED)
    tokens = sum(record.tokens for record in completed)
    span = _span(completed)
    return Figures(
        outcomes={outcome: counts[outcome] for outcome in Outcome},
        reasons=tuple((outcome, reason, count) for (outcome, reason), count in reasons.most_common()),
        output_tokens=tokens,
        tokens_estimated=any(record.estimated for record in completed),
        span_s=span,
        tokens_per_s=tokens / span if span else None,
        requests_per_s=len(completed) / span if span else None,
        ttft=distribution(record.ttft for record in completed),
        itl=distribution(gap for record in completed for gap in record.gaps),
        tpot=distribution(record.tpot for record in completed if record.tpot is not None),
        e2e=distribution(record.e2e for record in completed),
    )


def by_model(records: Sequence[Record], models: Iterable[str]) -> dict[str, Figures]:
    """The figures of each model that was asked, in the order of ``models``."""
    asked = {record.model for record in records}
    return {model: figures([r for r in records if r.model == model]) for model in models if model in asked}


def _span(completed: Sequence[Record]) -> float:
    """Seconds from the first start to the last end of completed requests: one that hung at the end lowers no rate."""
    if not completed:
        return 0.0
    return max(record.end for record in completed) - min(record.start for record in completed)
