"""What base, one variant and a mix of variants deliver through HTTP: ``python benchmarks/serving.py``.

Starts a server on the demo's base with the demo's variants (or asks the one at ``--url``) and measures every case once
a repeat, so that all of them see the same machine. Writes tokens per second and time to first token to
results/serving.jsonl, and their plot; or nothing if a request failed.
"""

import argparse
import asyncio
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.server.bench.client import Asking
from deltaserve.server.bench.load import open_client, served_models
from deltaserve.server.bench.prompts import random_prompts
from deltaserve.server.bench.report import Report
from deltaserve.server.bench.run import run
from deltaserve.server.bench.setup import Setup

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "deploy" / "demo"))

MEASURES = ("tokens_per_s", "ttft_ms", "tpot_ms")
LIBRARIES = ("torch", "transformers", "fastapi", "uvicorn", "httpx")
PROMPT_WORDS = 32


@dataclass(frozen=True, slots=True)
class Case:
    """``requests`` fill ``concurrency`` several times over, so that the last ones, less concurrent, weigh little."""

    what: str
    models: tuple[str, ...]
    concurrency: int
    requests: int


@dataclass(frozen=True, slots=True)
class Run:
    """One case in one repeat; ``ttft_ms`` and ``tpot_ms`` are medians over its requests."""

    case: Case
    tokens_per_s: float
    ttft_ms: float
    tpot_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="measure this server, whose first model is the base, and start none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3, help="requests per concurrent client")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for serving.jsonl and the plots")
    args = parser.parse_args()
    if find_spec("matplotlib") is None:
        raise SystemExit("The plot needs matplotlib; install it with: pip install 'deltaserve[dev]'")

    with served(args.url) as url:
        models = asyncio.run(models_of(url))
        if len(models) < 2:
            raise SystemExit(f"{url} serves {', '.join(models)} alone; push a variant first")
        cases = cases_of(models, args.concurrency, args.rounds)
        asking = Asking(max_tokens=args.max_tokens, ignore_eos=True)
        runs = list(measure(url, cases, asking, args.repeats))
    rows = [setup_row(asking, models), *measurement_rows(cases, runs), *goal_rows(runs, max(args.concurrency))]
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "serving.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot(rows, args.results / "serving")


@contextmanager
def served(url: str | None) -> Iterator[str]:
    """The address of a server that is ready; one of our own, on a fresh store, unless ``url`` names one."""
    if url:
        yield url.rstrip("/")
        return
    from base import base_folder
    from run import register_variants, wait_until_ready

    with tempfile.TemporaryDirectory() as store:
        port = free_port()
        options = ["--store", store, "--port", str(port), "--log-level", "warning"]
        command = [sys.executable, "-m", "deltaserve.server.cli", "serve", str(base_folder()), *options]
        server = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", server)
            register_variants(f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def models_of(url: str) -> list[str]:
    async with open_client(url) as client:
        return await served_models(client)


def cases_of(models: Sequence[str], concurrency: Sequence[int], rounds: int) -> list[Case]:
    """Base alone, one variant, and base and variants together, each at every concurrency."""
    groups = {"base alone": models[:1], "one variant": models[1:2], "uniform mix": models}
    return [
        Case(what, tuple(group), clients, requests=max(4, rounds * clients))
        for clients in concurrency
        for what, group in groups.items()
    ]


def measure(url: str, cases: Sequence[Case], asking: Asking, repeats: int) -> Iterator[Run]:
    """Every case once a repeat, every other time in the opposite order; before it all, each model is asked once."""
    everything = Case("warm-up", max((case.models for case in cases), key=len), concurrency=1, requests=1)
    measure_once(url, everything, asking, seed=0, warmup=len(everything.models))
    for repeat in range(repeats):
        for number, case in enumerate(cases if repeat % 2 == 0 else reversed(cases), start=1):
            report = measure_once(url, case, asking, seed=1 + repeat * len(cases) + number)
            total = report.total
            if total.tokens_per_s is None or total.ttft is None or total.tpot is None:
                raise SystemExit(f"{case.what} gave nothing to measure")
            found = Run(case, total.tokens_per_s, total.ttft.median, total.tpot.median)
            progress = f"repeat {repeat + 1} of {repeats}, case {number} of {len(cases)}"
            print(
                f"{progress}: {case.what}, {case.concurrency} concurrent: "
                f"{found.tokens_per_s:.1f} tokens/s, TTFT {found.ttft_ms:.0f} ms",
                flush=True,
            )
            yield found


def measure_once(url: str, case: Case, asking: Asking, seed: int, warmup: int = 0) -> Report:
    """One run with prompts of its own, so that no prefix cache has seen them; ends the script on a failure."""
    setup = Setup(
        url=url,
        mix="uniform",
        models=case.models,
        requests=case.requests,
        concurrency=case.concurrency,
        warmup_requests=warmup,
        prompts=f"prompts of {PROMPT_WORDS} random words",
        seed=seed,
        asking=asking,
    )
    report = asyncio.run(run(setup, random_prompts(PROMPT_WORDS, warmup + case.requests, seed)))
    if report.warmup_failed or report.total.failed_share:
        reasons = "; ".join(f"{count} {outcome}: {reason}" for outcome, reason, count in report.total.reasons)
        raise SystemExit(f"{case.what}, {case.concurrency} concurrent: not all requests completed. {reasons}")
    return report


def setup_row(asking: Asking, models: Sequence[str]) -> dict[str, Any]:
    return {
        "row": "setup",
        "machine": processor(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "command": shlex.join(["python", "benchmarks/serving.py", *sys.argv[1:]]),
        "models": list(models),
        "mix": "uniform",
        "prompt_words": PROMPT_WORDS,
        "asking": asdict(asking),
    }


def processor() -> str:
    """The processor's name; ``platform`` knows it on few systems."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git(*arguments: str) -> str | None:
    """What git says of the checkout; None where it is none."""
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def measurement_rows(cases: Sequence[Case], runs: Sequence[Run]) -> list[dict[str, Any]]:
    rows = []
    for case in cases:
        own = [run for run in runs if run.case == case]
        measures = {name: spread([getattr(run, name) for run in own]) for name in MEASURES}
        rows.append({"row": "measurement", **asdict(case), "repeats": len(own), **measures})
    return rows


def spread(values: Sequence[float]) -> dict[str, float]:
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def goal_rows(runs: Sequence[Run], concurrency: int) -> list[dict[str, Any]]:
    """What deltas cost: the ratio to the base alone within each repeat, whose median is the value."""
    base = rates(runs, "base alone", concurrency)
    rows = []
    for what in ("one variant", "uniform mix"):
        ratios = [own / alone for own, alone in zip(rates(runs, what, concurrency), base, strict=True)]
        rows.append(
            {
                "row": "goal",
                "name": f"{what}, {concurrency} concurrent: tokens/s against the base alone",
                "value": spread(ratios)["median"],
                "limit": 0.9,
                "better": "higher",
                "unit": "x",
                "ratios": ratios,
            }
        )
    return rows


def rates(runs: Sequence[Run], what: str, concurrency: int) -> list[float]:
    """Tokens per second of one case, in order of the repeats."""
    return [run.tokens_per_s for run in runs if (run.case.what, run.case.concurrency) == (what, concurrency)]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Medians with the 20th and 80th percentiles, as ``path``.png and ``path``.svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measurements = [row for row in rows if row["row"] == "measurement"]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = {"tokens_per_s": "Output tokens per second", "ttft_ms": "Time to first token, ms (median)"}
    for axis, (measure_name, title) in zip(axes, titles.items(), strict=True):
        for what in dict.fromkeys(row["what"] for row in measurements):
            own = [row for row in measurements if row["what"] == what]
            medians = np.array([row[measure_name]["median"] for row in own])
            low = medians - [row[measure_name]["p20"] for row in own]
            high = [row[measure_name]["p80"] for row in own] - medians
            ticks = [row["concurrency"] for row in own]
            axis.errorbar(ticks, medians, yerr=[low, high], marker="o", capsize=3, label=what)
            axis.set_xticks(ticks)
        axis.set(title=title, xlabel="concurrent requests", ylim=(0, 1.15 * axis.dataLim.ymax))
        axis.grid(alpha=0.3)
    axes[0].legend()
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
