"""Goodput: the requests that were as fast as somebody needs them to be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.bench.client import Outcome, Record

LIMITED = ("ttft", "tpot", "e2e")


@dataclass(frozen=True, slots=True)
class Goodput:
    """``requests`` met all of ``limits_ms``; ``share`` is theirs of all requests, those that failed included."""

    limits_ms: dict[str, float]
    requests: int
    share: float
    requests_per_s: float | None


def parse_limits(given: Sequence[str]) -> dict[str, float]:
    """``["ttft:200", "tpot:50"]`` as milliseconds by name. Raises OptionError."""
    limits = {}
    for text in given:
        name, _, value = text.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = 0.0
        if name not in LIMITED or not 0.0 < limit < float("inf"):
            raise OptionError(
                f"--goodput {text} is no limit; write NAME:MILLISECONDS, NAME one of {', '.join(LIMITED)}"
            )
        limits[name] = limit
    return limits


def goodput(records: Sequence[Record], limits_ms: Mapping[str, float], span_s: float) -> Goodput | None:
    """None without limits. An answer of one token has no TPOT, and so keeps within that limit."""
    if not limits_ms:
        return None
    good = sum(record.outcome is Outcome.COMPLETED and _keeps(record, limits_ms) for record in records)
    share = good / len(records) if records else 0.0
    return Goodput(dict(limits_ms), good, share, good / span_s if span_s else None)


def _keeps(record: Record, limits_ms: Mapping[str, float]) -> bool:
    seconds: dict[str, float | None] = {"ttft": record.ttft, "tpot": record.tpot, "e2e": record.e2e}
    return all((taken := seconds[name]) is None or 1000.0 * taken <= limit for name, limit in limits_ms.items())
