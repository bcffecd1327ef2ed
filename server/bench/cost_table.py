"""The table of costs: tokens a second and latencies of each case, beside the base alone and the merged model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from deltaserve.server.bench.client import Record
from deltaserve.server.bench.statistics import figures

BASE, MERGED, SWAPPED = "base alone", "merged model", "one variant, swapped in"
BESIDE, DISTINCT, ROTATION = "one variant, beside the base", "distinct variants", "rotation beyond residency"
UNSWAPPED = "the same engine, nothing swapped in"
SWAP_GOAL, DISTINCT_GOAL = 0.98, 0.90


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked for, and how many requests are under way."""

    what: str
    concurrency: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Over the repeats."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        p20, median, p80 = np.percentile(values, [20, 50, 80])
        return cls(float(median), float(p20), float(p80))

    @property
    def median_text(self) -> str:
        return f"{self.median:.{self._digits}f}"

    def __str__(self) -> str:
        return f"{self.median_text} ({self.p20:.{self._digits}f} to {self.p80:.{self._digits}f})"

    @property
    def _digits(self) -> int:
        return 1 if self.median >= 10 else 2


@dataclass(frozen=True, slots=True)
class Measured:
    """One case in one repeat; latencies are medians over its requests, in milliseconds."""

    tokens_per_s: float
    ttft_ms: float
    tpot_ms: float


@dataclass(slots=True)
class Costs:
    """``setup`` is the plan as JSON. ``reload_ms``: a merged checkpoint from file to first token; ``cold_ms``: what a
    cold variant adds to a first token; ``swap_ms``: into the base's weights or out again; one figure a repeat.
    """

    setup: dict[str, Any]
    cases: dict[Case, list[Measured]] = field(default_factory=dict)
    reload_ms: list[float] = field(default_factory=list)
    cold_ms: list[float] = field(default_factory=list)
    swap_ms: list[float] = field(default_factory=list)

    def add(self, case: Case, records: Sequence[Record]) -> None:
        """The records of one repeat."""
        found = figures(records)
        assert found.tokens_per_s is not None, "drive() raises where a request fails"
        assert found.ttft is not None
        tpot = found.tpot.median if found.tpot else float("nan")
        self.cases.setdefault(case, []).append(Measured(found.tokens_per_s, found.ttft.median, tpot))

    def ratio(self, case: Case, other: str) -> Spread:
        """Tokens a second over those of another case with as many requests under way, within each repeat."""
        pairs = zip(self.cases[case], self.cases[Case(other, case.concurrency)], strict=True)
        return Spread.of([own.tokens_per_s / others.tokens_per_s for own, others in pairs])

    def goals(self) -> list[dict[str, Any]]:
        """As rows of a results file."""
        wanted = [
            (case, other, SWAP_GOAL) for case in self.cases if case.what == SWAPPED for other in (MERGED, UNSWAPPED)
        ]
        wanted += [(case, BASE, DISTINCT_GOAL) for case in self.cases if case.what == DISTINCT]
        return [
            {
                "row": "goal",
                "name": f"{case.what}, {case.concurrency} under way: tokens/s against {other}",
                "value": self.ratio(case, other).median,
                "limit": limit,
                "better": "higher",
                "unit": "x",
            }
            for case, other, limit in wanted
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "setup": self.setup,
            "cases": [self._case_as_json(case) for case in self.cases],
            **{f"{name}_ms": asdict(spread) for name, spread in self._moves().items()},
            "goals": self.goals(),
        }

    def print(self, console: Console) -> None:
        names = ("at once", "tokens per s", "x base", "x merged", "TTFT ms", "TPOT ms")
        table = Table(
            Column("Case", no_wrap=True),
            *(Column(name, justify="right", min_width=6) for name in names),
            padding=(0, 0, 0, 1),
        )
        for case, measured in sorted(self.cases.items(), key=lambda item: item[0].concurrency):
            rate, ttft, tpot = (Spread.of([getattr(m, name) for m in measured]) for name in Measured.__slots__)
            cells = (rate, self.ratio(case, BASE), self.ratio(case, MERGED), ttft, tpot)
            table.add_row(case.what, str(case.concurrency), *(cell.median_text for cell in cells))
        console.print(table)
        labels = {
            "reload": "A merged checkpoint from file to first token",
            "cold": "What a cold variant adds to a first token",
            "swap": "A variant into the base's weights, or out again",
        }
        for name, spread in self._moves().items():
            console.print(f"{labels[name]}: {spread} ms")
        console.print(
            f"Medians of {len(self.reload_ms)} repeats (20th to 80th percentile; of the cases in --json and --save).",
            style="dim",
        )

    def _case_as_json(self, case: Case) -> dict[str, Any]:
        measured = self.cases[case]
        return {
            **asdict(case),
            "repeats": len(measured),
            **{name: asdict(Spread.of([getattr(m, name) for m in measured])) for name in Measured.__slots__},
            "over_base_alone": asdict(self.ratio(case, BASE)),
            "over_merged_model": asdict(self.ratio(case, MERGED)),
        }

    def _moves(self) -> dict[str, Spread]:
        found = {"reload": self.reload_ms, "cold": self.cold_ms, "swap": self.swap_ms}
        return {name: Spread.of(values) for name, values in found.items() if values}
