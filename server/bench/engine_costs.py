"""What variants cost in the engine, without HTTP: base alone, variants in every mix, the merged model, a reload.

Three engines in this process: one applies deltas beside the base, one swaps the variant that is alone into its weights,
one has loaded that variant's merged checkpoint. Cases take turns, every other repeat backwards, so that all of them see
the same machine; each is compared with the base alone, and the merged model, of its own repeat. Where in memory a
model lies makes some per cent of its speed, so what swapping costs is also seen on one engine, with and without.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoModelForCausalLM

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.errors import DeltaServeError, OptionError
from deltaserve.delta_store.fingerprint import fingerprint
from deltaserve.delta_store.merge import merge
from deltaserve.delta_store.profile import file_name, profile_folder
from deltaserve.server.bench import cost_table
from deltaserve.server.bench.client import Record
from deltaserve.server.bench.cost_table import Case, Costs
from deltaserve.server.bench.engine_load import PROMPT_TOKENS, Load, answer, ask, drive, random_ids, warm
from deltaserve.server.bench.invented import invent
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.limits import EngineLimits
from deltaserve.server.engine.loading import ArtifactLoader, stop_ids
from deltaserve.server.engine.requests import Version
from deltaserve.server.engine.wrapped import VersionDeltas

Show = Callable[[str, int, int], None]
CHECKED_TOKENS = 4
WARM_TOKENS = 2
MOVES = 3
"""Variants that are loaded, and swaps each way, in one repeat."""
NEVER_ASKED = 1_000_000
"""The first number of variants that no case asks for."""


@dataclass(frozen=True, slots=True)
class Plan:
    """``variants`` are artifacts for ``base``; without any, one is made up. Answers have ``max_tokens`` exactly.

    As many variants are in memory as requests are under way, ``concurrency``, and twice as many rotate. Where that is
    more than there are artifacts, they repeat, each copy in a memory of its own. After the first of at most ``repeats``
    no more begins that would end later than ``minutes`` after the measurement began.
    """

    base: str
    variants: tuple[Path, ...]
    profile: Path | None
    concurrency: int
    repeats: int
    max_tokens: int
    seed: int
    minutes: float

    def as_json(self) -> dict[str, object]:
        plan = {**asdict(self), "variants": [str(path) for path in self.variants] or "made up"}
        return {**plan, "profile": self.profile and str(self.profile), "prompt_tokens": PROMPT_TOKENS}


@dataclass(frozen=True, slots=True)
class Engines:
    beside: Engine
    swapping: Engine
    merged: Engine


def measure(plan: Plan, show: Show = lambda stage, done, total: None) -> Costs:
    """Runs every case, up to ``repeats`` times. Raises OptionError, and DeltaServeError where the answers are wrong."""
    if missing := [path for path in plan.variants if not path.is_file()]:
        raise OptionError(f"There is no artifact {missing[0]}; name files that `deltaserve compress` wrote")
    with tempfile.TemporaryDirectory() as scratch:
        show("Merge and load", 0, 4)
        artifacts = plan.variants or (_invented(plan.base, Path(scratch)),)
        merged = Path(scratch) / "merged"
        merge(plan.base, artifacts[0], merged, "float32", plan.profile)
        costs = Costs(plan.as_json())
        with _engines(plan, artifacts, merged, show) as engines:
            _check(engines)
            cases = _cases(engines, plan.concurrency)
            end = time.monotonic() + 60.0 * plan.minutes
            _repeat(replace(plan, max_tokens=WARM_TOKENS), 0, cases, engines, merged, show)
            for repeat in range(1, plan.repeats + 1):
                start = time.monotonic()
                _repeat(plan, repeat, cases, engines, merged, show).into(costs)
                now = time.monotonic()
                if now + (now - start) > end:
                    break
        return costs


@dataclass(frozen=True, slots=True)
class Repeat:
    """What one repeat found: the requests of each case, and milliseconds of the moves."""

    records: dict[Case, list[Record]]
    cold_ms: float
    swap_ms: float
    reload_ms: float

    def into(self, costs: Costs) -> None:
        for case, records in self.records.items():
            costs.add(case, records)
        costs.cold_ms.append(self.cold_ms)
        costs.swap_ms.append(self.swap_ms)
        costs.reload_ms.append(self.reload_ms)


def _repeat(plan: Plan, repeat: int, cases: dict[Case, Load], engines: Engines, merged: Path, show: Show) -> Repeat:
    """Every case once, every other repeat backwards; number 0 warms up."""
    stage = f"Repeat {repeat} of {plan.repeats}" if repeat else "Warm up"
    order = list(cases)[:: -1 if repeat % 2 else 1]
    records = {}
    for done, case in enumerate(order):
        show(stage, done, len(order) + 1)
        if case.what != cost_table.ROTATION:  # which has left other variants in memory than these
            asyncio.run(warm(cases[case], plan.seed + repeat))
        records[case] = asyncio.run(drive(cases[case], plan.max_tokens, plan.seed + repeat))
    show(stage, len(order), len(order) + 1)
    return Repeat(
        {case: records[case] for case in cases},
        asyncio.run(_cold_ms(engines.beside, NEVER_ASKED + MOVES * repeat, plan.seed)),
        asyncio.run(_swap_ms(engines.swapping, plan.seed + repeat)),
        _reload_ms(merged),
    )


def _cases(engines: Engines, concurrency: int) -> dict[Case, Load]:
    cases: dict[Case, Load] = {}
    for clients in dict.fromkeys((1, concurrency)):
        cases |= {
            Case(cost_table.BASE, clients): Load(engines.beside, clients, lambda i: None),
            Case(cost_table.BESIDE, clients): Load(engines.beside, clients, lambda i: _version(0)),
            Case(cost_table.SWAPPED, clients): Load(engines.swapping, clients, lambda i: _version(0)),
            Case(cost_table.UNSWAPPED, clients): Load(engines.swapping, clients, lambda i: None),
            Case(cost_table.MERGED, clients): Load(engines.merged, clients, lambda i: None),
            Case(cost_table.ROTATION, clients): Load(
                engines.beside, clients, lambda i: _version(i % (2 * concurrency))
            ),
        }
        if clients > 1:
            cases[Case(cost_table.DISTINCT, clients)] = Load(
                engines.beside, clients, lambda i: _version(i % concurrency)
            )
    return cases


def _version(number: int) -> Version:
    return Version(f"variant-{number}", f"{number:064}", "")


@contextmanager
def _engines(plan: Plan, artifacts: tuple[Path, ...], merged: Path, show: Show) -> Iterator[Engines]:
    load = _loader(plan, artifacts)
    running = max(32, plan.concurrency)
    bases: list[tuple[str | Path, str]] = [(plan.base, "mixed"), (plan.base, "swap"), (merged, "mixed")]
    with ExitStack() as stack:
        engines = []
        for done, (base, policy) in enumerate(bases, 1):
            show("Merge and load", done, 4)
            limits = EngineLimits(policy=policy, bank_slots=plan.concurrency, max_running=running)
            engine = Engine(base, limits=limits, load=load)
            engine.start()
            stack.callback(engine.stop)
            engines.append(engine)
        yield Engines(*engines)


def _loader(plan: Plan, artifacts: tuple[Path, ...]) -> Callable[[Version], VersionDeltas]:
    """Reads the artifact whose turn it is, as the engine itself would."""
    base = open_checkpoint(plan.base)
    folders = dict.fromkeys([*(path.absolute().parent for path in artifacts), profile_folder()])

    def profile_path(digest: str) -> Path:
        places = [plan.profile] if plan.profile else [folder / file_name(digest) for folder in folders]
        return next((place for place in places if place.is_file()), places[0])

    loader = ArtifactLoader(base, fingerprint(base), profile_path)

    def load(version: Version) -> VersionDeltas:
        artifact = open_artifact(artifacts[int(version.digest) % len(artifacts)])
        loader.check_base(artifact)
        return VersionDeltas(loader.deltas(artifact), artifact.manifest.tied_head, stop_ids(artifact))

    return load


def _check(engines: Engines) -> None:
    """Raise DeltaServeError unless the variant says the same beside the base, swapped in, and merged."""
    said = [
        asyncio.run(answer(engine, version, CHECKED_TOKENS))
        for engine, version in ((engines.merged, None), (engines.beside, _version(0)), (engines.swapping, _version(0)))
    ]
    if said[1] != said[0] or said[2] != said[0]:
        raise DeltaServeError(f"The variant's answers differ from its merged model's ({said}); nothing was measured")


async def _cold_ms(engine: Engine, first: int, seed: int) -> float:
    """What variants that were never asked for add to the wait for a first token, against the same ones once loaded."""
    added = []
    for number in range(first, first + MOVES):
        prompts = (random_ids(engine, seed + 2 * number), random_ids(engine, seed + 2 * number + 1))
        cold, warm = [await ask(engine, prompt, _version(number), max_tokens=1) for prompt in prompts]
        added.append(1000.0 * (cold.ttft - warm.ttft))
    return mean(added)


async def _swap_ms(engine: Engine, seed: int) -> float:
    """Of one swap, in or out, as the engine itself counts."""
    swaps, seconds = engine.policy.swaps, engine.policy.swap_seconds
    for number in range(2 * MOVES):
        await ask(engine, random_ids(engine, seed + number), _version(0) if number % 2 else None, max_tokens=1)
    return 1000.0 * (engine.policy.swap_seconds - seconds) / max(1, engine.policy.swaps - swaps)


def _reload_ms(folder: Path) -> float:
    """A checkpoint's whole model into memory, and one token through it: what serving it otherwise would cost."""
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.int64))
    return 1000.0 * (time.perf_counter() - start)


def _invented(base: str, folder: Path) -> Path:
    path = folder / "invented.safetensors"
    invent(base, path)
    return path
