"""Whether a server stays as it is under load: ``python benchmarks/soak.py [--minutes 30] [--variants 1000]``.

Asks a server of its own for variants by zipf's law, far more of them than fit into its memory, and prints its memory
and its latencies every minute. Each client waits ``--pause`` seconds between its requests. It measures errors, growth
and how far the latencies spread, not speed: it may run beside something else (``--note`` says what). Writes
results/soak.jsonl and its plot.
"""

import argparse
import asyncio
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from many_variants import DEMO, Served, deltaserve, names, register_copies
from serving import RESULTS, git, processor

from deltaserve.server.bench.client import Ask, Asking, Outcome, Record, send
from deltaserve.server.bench.cold_loads import loads
from deltaserve.server.bench.load import open_client
from deltaserve.server.bench.mix import assign
from deltaserve.server.bench.prompts import random_prompts

SAMPLE_S = 5.0
DRAWN = 100_000
"""Requests drawn beforehand; more than any run sends."""
SETTLED_MINUTE = 10
GROWTH_LIMIT = 0.02
SPREAD_LIMIT = 3.0
HOST_BYTES = 2**27
"""For the artifacts that stay open: full, as the bank is, before the tenth minute."""

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--variants", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=64, help="variants that fit into the server's memory")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between a client's requests")
    parser.add_argument("--threads", type=int, default=1, help="of the server's numeric libraries")
    parser.add_argument("--note", default="nothing else ran", help="what else runs on the machine meanwhile")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for soak.jsonl and the plot")
    args = parser.parse_args()

    sys.path.insert(0, str(DEMO))
    from base import base_folder

    options = ["--threads", str(args.threads), "--bank-slots", str(args.slots), "--host-bytes", str(HOST_BYTES)]
    with deltaserve(base_folder(), "base", options) as served:
        register_copies(served, args.variants)
        rows = [setup_row(args), *asyncio.run(soak(served, args))]
    if not any("e2e_ms" in row for row in rows):
        raise SystemExit(f"No request was completed: {rows[-1]['reasons']}")
    rows += goal_rows(rows)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "soak.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot(rows, args.results / "soak.png")


async def soak(served: Served, args: argparse.Namespace) -> list[Row]:
    """A row for each minute of the load."""
    asking = Asking(max_tokens=16, ignore_eos=True, timeout_s=120.0)
    models = assign("zipf", names(args.variants), DRAWN, seed=0)
    prompts = random_prompts((8, 64), DRAWN, seed=0)
    records: list[Record] = []
    memory: list[tuple[float, int]] = []
    start = time.perf_counter()
    end = start + 60.0 * args.minutes
    asks = map(Ask, models, prompts)

    async with open_client(served.url) as client:

        async def one_client() -> None:
            while time.perf_counter() < end:
                records.append(await send(client, asking, next(asks)))
                await asyncio.sleep(args.pause)

        before = await loads(client)
        watches = [
            asyncio.create_task(watch_memory(served, memory)),
            asyncio.create_task(tell(records, memory, start)),
        ]
        await asyncio.gather(*(one_client() for _ in range(args.concurrency)))
        for watch in watches:
            watch.cancel()
        after = await loads(client)
    cold = None if before is None or after is None else sum((after - before).values())
    minutes = [minute_row(minute, records, memory, start) for minute in range(round(args.minutes + 0.49))]
    return [*minutes, total_row(records, cold)]


async def tell(records: Sequence[Record], memory: Sequence[tuple[float, int]], start: float) -> None:
    """Prints each minute's row once the minute is over."""
    for minute in count():
        await asyncio.sleep(max(0.0, start + 60.0 * (minute + 1) - time.perf_counter()))
        print(json.dumps(minute_row(minute, records, memory, start)), flush=True)


async def watch_memory(served: Served, memory: list[tuple[float, int]]) -> None:
    """Appends (clock, resident bytes) now and every few seconds."""
    process = psutil.Process(served.process.pid)
    while True:
        memory.append((time.perf_counter(), process.memory_info().rss))
        await asyncio.sleep(SAMPLE_S)


def setup_row(args: argparse.Namespace) -> Row:
    return {
        "row": "setup",
        "machine": processor(),
        "cores": os.cpu_count(),
        "commit": git("rev-parse", "--short", "HEAD"),
        "command": shlex.join(["python", "benchmarks/soak.py", *sys.argv[1:]]),
        "mix": "zipf",
        "variants": args.variants,
        "slots": args.slots,
        "host_bytes": HOST_BYTES,
        "concurrency": args.concurrency,
        "pause_s": args.pause,
        "threads": args.threads,
        "niceness": os.nice(0),
        "beside": args.note,
        "load_before": os.getloadavg()[0],
    }


def minute_row(minute: int, records: Sequence[Record], memory: Sequence[tuple[float, int]], start: float) -> Row:
    """Requests that ended in this minute, and the memory during it."""
    low, high = start + 60.0 * minute, start + 60.0 * (minute + 1)
    own = [record for record in records if low <= record.end < high]
    rss = [size for moment, size in memory if low <= moment < high]
    return {
        "row": "minute",
        "minute": minute,
        "rss_mb": float(np.median(rss)) / 1e6 if rss else None,
        "stopped_s": stopped_s(memory, low, high),
        **latencies(own),
    }


def stopped_s(memory: Sequence[tuple[float, int]], low: float, high: float) -> float:
    """Seconds by which samples of this minute came late: somebody else stopped all of us for a measurement."""
    late = (later - earlier - SAMPLE_S for (earlier, _), (later, _) in pairwise(memory) if low <= later < high)
    return sum(seconds for seconds in late if seconds > SAMPLE_S)


def total_row(records: Sequence[Record], cold_loads: int | None) -> Row:
    reasons = sorted({record.reason for record in records if record.reason})
    asked = len({record.model for record in records})
    return {"row": "total", "models_asked": asked, "cold_loads": cold_loads, "reasons": reasons, **latencies(records)}


def latencies(records: Sequence[Record]) -> Row:
    completed = [record for record in records if record.outcome is Outcome.COMPLETED]
    row: Row = {"requests": len(records), "failed": len(records) - len(completed)}
    for name, seconds in {"ttft": [r.ttft for r in completed], "e2e": [r.e2e for r in completed]}.items():
        if seconds:
            median, p99 = np.percentile(seconds, [50, 99])
            row[f"{name}_ms"] = {"median": 1e3 * median, "p99": 1e3 * p99, "max": 1e3 * max(seconds)}
    return row


def goal_rows(rows: Sequence[Row]) -> list[Row]:
    """Memory is compared from the tenth minute on: its last third with its first. A short run has half for that.

    Minutes in which all processes were stopped from outside tell nothing about the server's latencies.
    """
    minutes = [row for row in rows if row["row"] == "minute" and "e2e_ms" in row]
    total = next(row for row in rows if row["row"] == "total")
    settled = minutes[SETTLED_MINUTE:] if len(minutes) > SETTLED_MINUTE + 3 else minutes[len(minutes) // 2 :]
    third = max(1, len(settled) // 3)
    sizes = [row["rss_mb"] for row in settled if row["rss_mb"]]
    growth = float(np.median(sizes[-third:]) / np.median(sizes[:third])) - 1.0
    tails = [row["e2e_ms"]["p99"] for row in settled if not row["stopped_s"]]
    return [
        goal("requests that failed", total["failed"], 0, "requests"),
        goal("growth of the server's memory after the tenth minute", growth, GROWTH_LIMIT, "share"),
        goal(
            "largest p99 of a minute's whole answers over their median",
            max(tails) / np.median(tails),
            SPREAD_LIMIT,
            "x",
        ),
    ]


def goal(name: str, value: float, limit: float, unit: str) -> Row:
    return {"row": "goal", "name": name, "value": float(value), "limit": limit, "better": "lower", "unit": unit}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Memory and latencies over time."""
    from matplotlib.figure import Figure

    minutes = [row for row in rows if row["row"] == "minute" and "e2e_ms" in row]
    at = [row["minute"] + 0.5 for row in minutes]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    memory, latency = figure.subplots(1, 2)
    memory.plot(at, [row["rss_mb"] for row in minutes])
    memory.set(title="Resident memory of the server, MB", xlabel="minutes", ylim=(0, None))
    for name in ("ttft_ms", "e2e_ms"):
        for figure_name, style in (("median", "-"), ("p99", "--")):
            values = [row[name][figure_name] for row in minutes]
            latency.plot(at, values, style, label=f"{name.removesuffix('_ms').upper()} {figure_name}")
    latency.set(title="Milliseconds, by minute", xlabel="minutes", ylim=(0, None))
    latency.legend(fontsize="small")
    for axis in (memory, latency):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
