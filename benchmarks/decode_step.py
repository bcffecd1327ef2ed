"""What variants cost in the engine: ``python benchmarks/decode_step.py BASE``.

BASE is a checkpoint's folder (the demo's: deploy/demo/base.py prints it). In process, without HTTP: requests that all
decode at once, asked of the base, of one variant (beside the base, and swapped into its weights), and each of another
variant; also with int8 weights and in bfloat16. The variants are random, in the shape of the demo's artifacts (weighted
drop, p = 0.98, V = 16, int2; rank 4 for the embedding; norms), each in its own memory. Cases take turns within a round;
``over_base`` is over the base in float32. Writes results/decode_step.jsonl.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.kernels import dispatch
from deltaserve.kernels.codes import float_codes
from deltaserve.kernels.parts import Codes, Delta, Dense, LowRank
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.limits import EngineLimits
from deltaserve.server.engine.requests import Sampling, Version
from deltaserve.server.engine.wrapped import VersionDeltas
from kernels import machine, random_delta, read_bandwidth, spread

CONCURRENCY = (1, 4, 16)
VARIANTS = 16
TOKENS = 40
PROMPT = range(100, 120)
MIXED = EngineLimits(policy="mixed", cache_tokens=4096)
ENGINES = {
    "mixed": MIXED,
    "swap": replace(MIXED, policy="swap"),
    "int8": replace(MIXED, weights="int8"),
    "bfloat16": replace(MIXED, dtype="bfloat16"),
}


def random_variant(shapes: dict[str, tuple[int, ...]], embedding: str) -> Iterator[tuple[str, Delta]]:
    """Deltas of this base's shapes, small enough to leave its answers sane."""
    for name, shape in shapes.items():
        if len(shape) == 1:
            yield name, Delta(shape, (Dense(shape, float_codes(torch.randn(shape) * 1e-3, "bf16")),))
        elif name == embedding:
            yield name, Delta(shape, (LowRank(shape, int8((4, shape[1]), shape[1]), int8((shape[0], 4), 64)),))  # type: ignore[arg-type]
        else:
            delta = random_delta(shape, 0.02, 16, "int2")  # type: ignore[arg-type]
            delta.parts[0].values.scales.mul_(1e-4)  # type: ignore[union-attr]
            yield name, delta


def int8(shape: tuple[int, int], group: int) -> Codes:
    count = shape[0] * shape[1]
    return Codes(
        "int8",
        shape,
        torch.randint(0, 256, (count,), dtype=torch.uint8),
        torch.full((count // group,), 1e-5).bfloat16(),
        group,
    )


async def decode(engine: Engine, concurrency: int, version: Callable[[int], Version | None]) -> float:
    """Milliseconds a step, from the first token that all requests have to the last."""
    times: list[float] = []

    async def ask(i: int) -> None:
        prompt = [token + i for token in PROMPT]  # no shared prefixes
        stream = await engine.submit(prompt, version(i), Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True))
        async for _ in stream:
            times.append(time.perf_counter())

    await asyncio.gather(*(ask(i) for i in range(concurrency)))
    if len(times) != concurrency * TOKENS:
        raise SystemExit("An answer ended early; nothing is reported")
    return (times[-concurrency] - times[2 * concurrency]) * 1000 / (TOKENS - 3)


async def measure(engines: dict[str, Engine], rounds: int) -> list[dict]:
    versions = [Version(f"variant-{i}", f"{i:064}", "") for i in range(VARIANTS)]
    cases: dict[str, tuple[Engine, Callable[[int], Version | None]]] = {
        "base": (engines["mixed"], lambda i: None),
        "one variant": (engines["mixed"], lambda i: versions[0]),
        "each another variant": (engines["mixed"], lambda i: versions[i]),
        "swapped": (engines["swap"], lambda i: versions[0]),
    }
    for name in ("int8", "bfloat16"):
        cases[f"{name}, base"] = (engines[name], lambda i: None)
        cases[f"{name}, each another variant"] = (engines[name], lambda i: versions[i])
    rows = []
    for concurrency in CONCURRENCY:
        times: dict[str, list[float]] = {name: [] for name in cases}
        for round_ in range(rounds + 1):
            for name, (engine, version) in cases.items():
                step = await decode(engine, concurrency, version)
                if round_:  # the first one warms up
                    times[name].append(step)
        for name, values in times.items():
            ratio = [value / base for value, base in zip(values, times["base"], strict=True)]
            rows.append(
                {"row": "step", "what": name, "concurrency": concurrency, "ms": spread(values), "repeats": rounds}
                | {"over_base": spread(ratio)}
            )
            print(f"{concurrency} requests, {name}: {spread(values)['median']:.1f} ms, {spread(ratio)['median']:.2f}x")
    return rows


def swap_costs(engine: Engine) -> dict:
    """What one swap takes, in or out, on average."""

    async def to_and_fro() -> None:
        for i in range(10):
            await decode(engine, 1, lambda _, i=i: Version("variant-0", f"{0:064}", "") if i % 2 else None)

    swaps, seconds = engine.policy.swaps, engine.policy.swap_seconds
    asyncio.run(to_and_fro())
    count, ms = engine.policy.swaps - swaps, (engine.policy.swap_seconds - seconds) * 1000
    print(f"a swap: {ms / count:.1f} ms")
    return {"row": "swap", "what": "in or out", "mean_ms": round(ms / count, 3), "repeats": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "decode_step.jsonl")
    arguments = parser.parse_args()
    speed = read_bandwidth()
    checkpoint = open_checkpoint(arguments.base)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names}
    embedding = next(name for name in shapes if "embed" in name)

    def load(version: Version) -> VersionDeltas:
        torch.manual_seed(int(version.digest))
        return VersionDeltas(random_variant(shapes, embedding), tied_head=True)

    engines = {name: Engine(arguments.base, limits=limits, load=load) for name, limits in ENGINES.items()}
    for engine in engines.values():
        engine.start()
    rows = [machine(dispatch.backend(), speed), *asyncio.run(measure(engines, arguments.rounds))]
    rows.append(swap_costs(engines["swap"]))
    for engine in engines.values():
        engine.stop()
    ratio = next(r for r in rows if r.get("concurrency") == 16 and r["what"] == "each another variant")["over_base"]
    rows.append(
        {"row": "goal", "name": "16 requests each of another variant, decode step against the base's"}
        | {"value": ratio["median"], "limit": 1.1, "better": "lower", "unit": "x"}
    )
    arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
