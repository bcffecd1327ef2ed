"""What a run says at its end: one JSON document for programs, tables for people, both of the same figures."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from deltaserve.server.bench.client import Asking, Outcome
from deltaserve.server.bench.statistics import PERCENTILE_METHOD, Distribution, Figures

ROWS = {
    "ttft": "Time to first token (TTFT)",
    "gap": "Gap, per event",
    "tpot": "Time per output token (TPOT)",
    "e2e": "Whole answer (E2E)",
}


@dataclass(frozen=True, slots=True)
class Setup:
    """All that is needed to run the same again. ``prompts`` says where they came from."""

    url: str
    mix: str
    models: tuple[str, ...]
    requests: int
    concurrency: int
    warmup_requests: int
    prompts: str
    seed: int
    asking: Asking


@dataclass(frozen=True, slots=True)
class Report:
    """``total`` covers the measured requests of all models; warm-up requests are in no figure."""

    setup: Setup
    warmup_failed: int
    total: Figures
    models: Mapping[str, Figures]

    def as_json(self) -> dict[str, Any]:
        """Latencies in milliseconds, under names that say so."""
        setup = asdict(self.setup)
        asking = setup.pop("asking")
        return {
            "setup": {**setup, **asking, "percentile_method": PERCENTILE_METHOD},
            "warmup_failed": self.warmup_failed,
            **_as_json(self.total),
            "per_model": {model: _as_json(part) for model, part in self.models.items()},
        }

    def print(self, console: Console) -> None:
        setup = self.setup
        console.print(
            f"Mix: {setup.mix} over {', '.join(setup.models)}. Concurrency: {setup.concurrency} (closed loop). "
            f"Requests: {setup.requests} after {setup.warmup_requests} to warm up ({self.warmup_failed} failed); "
            f"{setup.prompts}.",
            markup=False,
            highlight=False,
        )
        console.print(_rates(self.total))
        console.print(_latency_table(self.total))
        for note in _notes(self.total):
            console.print(note, style="dim")
        if len(self.models) > 1:
            console.print(_model_table(self.models))
        for outcome, reason, count in self.total.reasons:
            console.print(f"{count} {outcome}: {reason}", style="red", markup=False)


def _as_json(part: Figures) -> dict[str, Any]:
    return {
        "outcomes": {outcome.value.replace(" ", "_"): count for outcome, count in part.outcomes.items()},
        "reasons": [{"outcome": o.value, "reason": reason, "count": count} for o, reason, count in part.reasons],
        "output_tokens": part.output_tokens,
        "output_tokens_from": "estimate: events with text" if part.tokens_estimated else "usage",
        "span_s": part.span_s,
        "output_tokens_per_s": part.tokens_per_s,
        "requests_per_s": part.requests_per_s,
        "ttft_ms": _distribution_as_json(part.ttft),
        "gap_per_event_ms": _distribution_as_json(part.gap),
        "tpot_ms": _distribution_as_json(part.tpot),
        "e2e_ms": _distribution_as_json(part.e2e),
    }


def _distribution_as_json(distribution: Distribution | None) -> dict[str, Any] | None:
    return None if distribution is None else asdict(distribution)


def _rates(part: Figures) -> str:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in part.outcomes.items())
    estimated = " (estimated)" if part.tokens_estimated else ""
    return (
        f"{counts}; {part.output_tokens} output tokens{estimated} in {part.span_s:.2f} s: "
        f"{_number(part.tokens_per_s)} tokens/s{estimated}, {_number(part.requests_per_s, 2)} requests/s"
    )


def _latency_table(part: Figures) -> Table:
    table = Table("Milliseconds", *(_right(name) for name in ("samples", "mean", "median", "p95", "p99")))
    for field, label in ROWS.items():
        distribution: Distribution | None = getattr(part, field)
        table.add_row(label, *_cells(distribution))
    return table


def _cells(distribution: Distribution | None) -> list[str]:
    if distribution is None:
        return ["0", "-", "-", "-", "-"]
    values = (distribution.mean, distribution.median, distribution.p95, distribution.p99)
    cells = [str(distribution.samples), *(_number(value) for value in values)]
    if distribution.p99_is_rough:
        cells[-1] += "*"
    return cells


def _model_table(models: Mapping[str, Figures]) -> Table:
    columns = ("completed", "not completed", "tokens", "TTFT median", "TPOT median", "E2E median", "E2E p95")
    table = Table("Model", *(_right(name) for name in columns))
    for model, part in models.items():
        completed = part.outcomes[Outcome.COMPLETED]
        medians = [_number(d.median if d else None) for d in (part.ttft, part.tpot, part.e2e)]
        p95 = _number(part.e2e.p95 if part.e2e else None)
        table.add_row(model, str(completed), str(part.requests - completed), str(part.output_tokens), *medians, p95)
    return table


def _notes(part: Figures) -> list[str]:
    """What a reader must know to take the figures for what they are."""
    notes = [f"Percentiles: {PERCENTILE_METHOD}.", "Gaps are per event, and an event may hold several tokens."]
    if any(d is not None and d.p99_is_rough for d in (part.ttft, part.gap, part.tpot, part.e2e)):
        notes.append("* of fewer than 100 samples: little more than the slowest one.")
    if part.tokens_estimated:
        notes.append("The server reported no usage: tokens are estimated as the number of events with text.")
    return notes


def _right(name: str) -> Column:
    return Column(name, justify="right")


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
