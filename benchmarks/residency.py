"""What residency costs: ``python benchmarks/residency.py BASE [--registered 1000] [--resident 200]``.

BASE is the demo's checkpoint (deploy/demo/base.py prints it). Artifacts are a demo variant's with other numbers, once
with masks drawn from one seed (as ``deltaserve compress`` does) and once with a seed each. In process, without HTTP:
memory (VmRSS) after all residents answered once over that of the base alone; then the first token of a cold variant
against that of a warm one, and the longest gap of a running stream meanwhile. Writes results/residency.jsonl.
"""

import argparse
import asyncio
import gc
import hashlib
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from deltaserve.delta_store.codec.artifact import open_artifact, write_artifact
from deltaserve.delta_store.codec.specs import SparseSpec, Spec
from deltaserve.delta_store.profile import Profile
from deltaserve.delta_store.registry import Receipt
from deltaserve.delta_store.registry.sqlite import SqliteRegistry
from deltaserve.kernels import dispatch
from deltaserve.kernels.codes import BITS
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.limits import EngineLimits
from deltaserve.server.engine.requests import Sampling, Version
from kernels import machine, read_bandwidth, spread

ON_STDERR = Console(stderr=True)
DEMO = Path(__file__).parent.parent / "deploy" / "demo"
PROMPT = list(range(100, 120))
PROBES = 20
SOURCE = DEMO / "variants" / "python.safetensors"
FIRST_SEED, SEED = 10_000, b'\\"seed\\":%d'
"""Seeds have as many digits each, and so headers one length; the manifest is JSON inside of JSON."""


class Maker:
    """Artifacts like one of the demo's: the bytes of one that the codec wrote, with other codes in its sparse parts."""

    def __init__(self, folder: Path, *, one_seed: bool) -> None:
        self.folder, self.one_seed = folder, one_seed
        source, profile = open_artifact(SOURCE), Profile.open(DEMO / "profile.safetensors")
        parts = (
            (name, seeded(spec), part)
            for name in source.names
            for spec, part in zip(source.specs(name), source.delta(name, profile).parts, strict=True)
        )
        first = folder / "first"
        write_artifact(first, base=source.manifest.base, tied_head=True, parts=parts, profile=profile.digest)
        content = first.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        self.header, self.body = content[:start], np.frombuffer(content[start:], np.uint8)
        spans, made = json.loads(content[8:start]), open_artifact(first)
        first.unlink()
        self.codes: list[tuple[int, int]] = []  # the end of each sparse part: its codes stand behind its scales
        for name in made.names:
            for index in made.keys[name]:
                spec, end = made.manifest.parts[index], spans[f"{name}:{index}"]["data_offsets"][1]
                if isinstance(spec, SparseSpec):
                    self.codes.append((end - spec.blocks * spec.kept * spec.block * BITS[spec.codec] // 8, end))

    def make(self, number: int) -> Version:
        body, rng = self.body.copy(), np.random.default_rng(number)
        for begin, end in self.codes:
            body[begin:end] = rng.integers(0, 256, end - begin, np.uint8)
        seed = FIRST_SEED + (0 if self.one_seed else number)
        content = self.header.replace(SEED % FIRST_SEED, SEED % seed) + body.tobytes()
        path = self.folder / str(number)
        path.write_bytes(content)
        return Version(f"v{number}", hashlib.sha256(content).hexdigest(), str(path))


def seeded(spec: Spec) -> Spec:
    return spec.model_copy(update={"seed": FIRST_SEED}) if isinstance(spec, SparseSpec) else spec


def memory_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def engine(base: str, slots: int) -> Engine:
    limits = EngineLimits(policy="mixed", cache_tokens=4096, bank_slots=slots, bank_bytes=2**32)
    started = Engine(base, limits=limits, profile_path=lambda digest: DEMO / "profile.safetensors")
    started.start()
    return started


async def first_token_ms(it: Engine, on: Version | None, salt: int) -> float:
    start = time.perf_counter()
    stream = await it.submit([salt, *PROMPT], on, Sampling(max_tokens=1, temperature=0, ignore_eos=True))
    async for _ in stream:
        pass
    return (time.perf_counter() - start) * 1000


async def gaps_ms(it: Engine, gaps: list[float]) -> None:
    """A base stream, begun again whenever it ends, and the times between its tokens."""
    while True:
        last = None
        async for _ in await it.submit(PROMPT, None, Sampling(max_tokens=400, temperature=0, ignore_eos=True)):
            now = time.perf_counter()
            if last is not None:
                gaps.append((now - last) * 1000)
            last = now


def base_alone(base: str, results: Any) -> None:
    it = engine(base, 1)
    asyncio.run(first_token_ms(it, None, 1))
    results.put(memory_bytes())


def residents(base: str, versions: list[Version], resident: int, folder: str, results: Any) -> None:
    registry = SqliteRegistry(Path(folder) / "registry.sqlite3")
    for version in versions:
        registry.register(version.variant, Receipt(version.digest, Path(version.path).stat().st_size, "", None, 0, 0))
    it = engine(base, resident)
    asyncio.run(measure(it, versions, resident, results))


async def measure(it: Engine, versions: list[Version], resident: int, results: Any) -> None:
    for version in track(versions[:resident], "  fill the bank", console=ON_STDERR):
        await first_token_ms(it, version, 1)
    gc.collect()
    used = memory_bytes()
    cold, warm, gaps = [], [], []
    for i in track(range(PROBES), "  cold and warm", console=ON_STDERR):
        cold.append(await first_token_ms(it, versions[-1 - i], 2))
        warm.append(await first_token_ms(it, versions[-1 - i], 3))
    stream = asyncio.create_task(gaps_ms(it, gaps))
    await asyncio.sleep(1)
    gaps.clear()
    for i in track(range(PROBES, 2 * PROBES), "  beside a stream", console=ON_STDERR):
        await first_token_ms(it, versions[-1 - i], 2)
    stream.cancel()
    results.put({"memory_bytes": used, "cold_ms": cold, "warm_ms": warm, "gaps_ms": gaps})


def in_a_process(target: Any, *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=target, args=(*arguments, results), daemon=True)
    process.start()
    measured = results.get(timeout=600)
    process.kill()
    return measured


def goal(name: str, value: float, limit: float, unit: str) -> dict[str, Any]:
    return {
        "row": "goal",
        "name": name,
        "value": round(value, 2),
        "limit": round(limit, 2),
        "better": "lower",
        "unit": unit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("--registered", type=int, default=1000)
    parser.add_argument("--resident", type=int, default=200)
    asked = parser.parse_args()
    base_bytes = (Path(asked.base) / "model.safetensors").stat().st_size
    rows: list[dict[str, Any]] = [
        machine(dispatch.backend(), read_bandwidth()) | {"command": "python benchmarks/residency.py BASE"}
    ]
    goals: list[dict[str, Any]] = []
    alone = in_a_process(base_alone, asked.base)
    for one_seed in (True, False):
        ON_STDERR.print("Masks of one seed" if one_seed else "Masks of a seed each")
        with tempfile.TemporaryDirectory() as folder:
            maker = Maker(Path(folder), one_seed=one_seed)
            versions = [maker.make(i) for i in track(range(asked.registered), "  artifacts", console=ON_STDERR)]
            artifact_bytes = sum(Path(one.path).stat().st_size for one in versions[: asked.resident])
            found = in_a_process(residents, asked.base, versions, asked.resident, folder)
        setup = {
            "masks": "one seed" if one_seed else "a seed each",
            "registered": asked.registered,
            "resident": asked.resident,
        }
        over = found["memory_bytes"] - alone
        rows += [
            {
                "row": "memory",
                **setup,
                "base_alone_bytes": alone,
                "over_base_bytes": over,
                "artifact_bytes": artifact_bytes,
                "over_base_by_artifacts": round(over / artifact_bytes, 3),
            },
            {"row": "first_token_ms", "variant": "cold", **setup, **spread(found["cold_ms"])},
            {"row": "first_token_ms", "variant": "warm", **setup, **spread(found["warm_ms"])},
            {"row": "longest_gap_ms", **setup, "value": max(found["gaps_ms"]), "tokens": len(found["gaps_ms"])},
        ]
        later = median(found["cold_ms"]) - median(found["warm_ms"])
        label = f"({setup['masks']})"
        goals += [
            goal(f"memory of residents {label}", over / 1e6, (1.5 * artifact_bytes + 0.1 * base_bytes) / 1e6, "MB"),
            goal(f"cold first token later than a warm one {label}", later, 60, "ms"),
            goal(f"longest gap of a running stream {label}", max(found["gaps_ms"]), 100, "ms"),
        ]
    out = Path(__file__).parent / "results" / "residency.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows + goals))
    for row in rows[1:] + goals:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
