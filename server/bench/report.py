"""What a run says at its end: one JSON document for programs, tables for people, both of the same figures."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from deltaserve.server.bench.client import Outcome, Record
from deltaserve.server.bench.cold_loads import of_model
from deltaserve.server.bench.goodput import Goodput
from deltaserve.server.bench.setup import Setup
from deltaserve.server.bench.statistics import PERCENTILE_METHOD, Distribution, Figures

ROWS = {
    "ttft": "Time to first token (TTFT)",
    "itl": "Between events (ITL), per event",
    "tpot": "Time per output token (TPOT)",
    "e2e": "Whole answer (E2E)",
}
SHOWN_MODELS = 20


@dataclass(frozen=True, slots=True)
class Report:
    """``total`` covers the measured requests of all models; warm-up requests are in no figure.

    ``cold_loads`` counts by model what the server loaded meanwhile, None where it does not say. ``records`` are the
    measured requests, for a plot.
    """

    setup: Setup
    warmup_failed: int
    total: Figures
    models: Mapping[str, Figures]
    goodput: Goodput | None = None
    cold_loads: Mapping[str, int] | None = None
    records: tuple[Record, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Latencies in milliseconds, under names that say so."""
        loads = self.cold_loads
        return {
            "setup": self.setup.as_json(),
            "warmup_failed": self.warmup_failed,
            **_as_json(self.total),
            "goodput": None if self.goodput is None else asdict(self.goodput),
            "cold_loads": None if loads is None else sum(loads.values()),
            "per_model": {
                model: {**_as_json(part), "cold_loads": of_model(loads, model)} for model, part in self.models.items()
            },
        }

    def print(self, console: Console) -> None:
        setup = self.setup
        console.print(
            f"{setup} Requests: {setup.requests} after {setup.warmup_requests} to warm up "
            f"({self.warmup_failed} failed); {setup.prompts}.",
            markup=False,
            highlight=False,
        )
        console.print(_rates(self.total))
        for line in self._extras():
            console.print(line)
        console.print(_latency_table(self.total))
        for note in _notes(self.total):
            console.print(note, style="dim")
        if len(self.models) > 1:
            console.print(_model_table(self.models, self.cold_loads))
        for outcome, reason, count in self.total.reasons:
            console.print(f"{count} {outcome}: {reason}", style="red", markup=False)

    def _extras(self) -> list[str]:
        lines = []
        if (good := self.goodput) is not None:
            limits = ", ".join(f"{name} <= {limit:g} ms" for name, limit in good.limits_ms.items())
            rate = _number(good.requests_per_s, 2)
            lines.append(f"Goodput ({limits}): {good.requests} requests, {good.share:.1%}, {rate} requests/s")
        if self.cold_loads is not None:
            lines.append(f"Cold loads, by the server's count: {sum(self.cold_loads.values())}")
        return lines


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
        "itl_per_event_ms": _distribution_as_json(part.itl),
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


def _model_table(models: Mapping[str, Figures], cold_loads: Mapping[str, int] | None) -> Table:
    """The models asked most often come first, and of many only those are shown."""
    columns = ("completed", "not completed", "tokens", "TTFT median", "TPOT median", "E2E median", "E2E p95")
    loads = ("cold loads",) if cold_loads is not None else ()
    table = Table("Model", *(_right(name) for name in (*columns, *loads)))
    shown = sorted(models, key=lambda model: -models[model].requests)[:SHOWN_MODELS]
    for model in shown if len(models) > SHOWN_MODELS else models:
        part = models[model]
        completed = part.outcomes[Outcome.COMPLETED]
        medians = [_number(d.median if d else None) for d in (part.ttft, part.tpot, part.e2e)]
        p95 = _number(part.e2e.p95 if part.e2e else None)
        loaded = [_count(of_model(cold_loads, model))] if cold_loads is not None else []
        cells = (str(completed), str(part.requests - completed), str(part.output_tokens), *medians, p95, *loaded)
        table.add_row(model, *cells)
    if len(models) > SHOWN_MODELS:
        table.caption = f"The {SHOWN_MODELS} most asked of {len(models)} models; --json and --save give all."
    return table


def _notes(part: Figures) -> list[str]:
    """What a reader must know to take the figures for what they are."""
    notes = [
        f"Percentiles: {PERCENTILE_METHOD}.",
        "ITL is between events with text, and an event may hold several tokens.",
    ]
    if any(d is not None and d.p99_is_rough for d in (part.ttft, part.itl, part.tpot, part.e2e)):
        notes.append("* of fewer than 100 samples: little more than the slowest one.")
    if part.tokens_estimated:
        notes.append("The server reported no usage: tokens are estimated as the number of events with text.")
    return notes


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _right(name: str) -> Column:
    return Column(name, justify="right")


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
