"""A run as a picture: how the latencies are distributed, and how they went over time."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.bench.client import Outcome, Record
from deltaserve.server.bench.report import Report

SUFFIXES = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Raise OptionError where no plot could be written to ``path`` later."""
    if find_spec("matplotlib") is None:
        raise OptionError("--plot needs matplotlib; install it with: pip install 'deltaserve[plot]'")
    if path.suffix not in SUFFIXES:
        raise OptionError(f"--plot {path} has no known suffix; known are {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise OptionError(f"--plot {path}: there is no folder {path.parent}; make it first")


def plot(report: Report, path: Path) -> None:
    """Write the picture of the completed requests; the suffix of ``path`` says in which format."""
    from matplotlib.figure import Figure

    completed = [record for record in report.records if record.outcome is Outcome.COMPLETED]
    figure = Figure(figsize=(10, 4), layout="constrained")
    shares, course = figure.subplots(1, 2)
    latencies = {
        "TTFT": [record.ttft for record in completed],
        "TPOT": [record.tpot for record in completed if record.tpot is not None],
        "E2E": [record.e2e for record in completed],
    }
    for name, seconds in latencies.items():
        shares.ecdf(1000.0 * np.array(seconds or [np.nan]), label=name)
    shares.set(title="Share of requests within", xlabel="milliseconds", xscale="log")
    shares.legend()
    start = min((record.start for record in report.records), default=0.0)
    for name, times in _course(completed, start).items():
        course.scatter(*times, s=9, alpha=0.6, label=name)
    for record in report.records:
        if record.outcome is not Outcome.COMPLETED:
            course.axvline(record.start - start, color="tab:red", alpha=0.4)
    course.set(title="Time to first token", xlabel="seconds after the start", ylabel="milliseconds", ylim=(0, None))
    if 1 < len(report.models) <= 10:
        course.legend(fontsize="small")
    for axis in (shares, course):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _course(completed: Sequence[Record], start: float) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds at which the requests for each model began, and the milliseconds to their first token."""
    models = dict.fromkeys(record.model for record in completed)
    return {
        model: (
            [record.start - start for record in completed if record.model == model],
            [1000.0 * record.ttft for record in completed if record.model == model],
        )
        for model in models
    }
