"""Requests to an engine in this process: the closed loop of load.py without HTTP, and the same records."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from deltaserve.server.bench.client import Outcome, Record
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.requests import Sampling, Version

PROMPT_TOKENS = 32
WARM_SEED = 1 << 40
"""Far from those of the prompts that are measured, which have 32 bits."""
ROUNDS = 2
"""Requests of each client; a client alone sends twice as many."""


@dataclass(frozen=True, slots=True)
class Load:
    """``version(i)`` is what the i-th request asks for, None the base; ``clients`` are under way at any time."""

    engine: Engine
    clients: int
    version: Callable[[int], Version | None]


async def drive(load: Load, max_tokens: int, seed: int) -> list[Record]:
    """Runs a load to its end. A request that fails raises the engine's error: nothing is measured then."""
    generator = random.Random(seed)
    requests = iter(range(load.clients * ROUNDS * (2 if load.clients == 1 else 1)))
    records: list[Record] = []

    async def one_client() -> None:
        for number in requests:
            prompt = random_ids(load.engine, generator.getrandbits(32))
            records.append(await ask(load.engine, prompt, load.version(number), max_tokens))

    async with asyncio.TaskGroup() as clients:
        for _ in range(load.clients):
            clients.create_task(one_client())
    return records


async def warm(load: Load, seed: int) -> None:
    """One short request of each variant that the load's clients ask for first, so that no measured one waits for it."""
    versions = {version.digest: version for version in map(load.version, range(load.clients)) if version is not None}
    for number, version in enumerate(versions.values()):
        await ask(load.engine, random_ids(load.engine, WARM_SEED + load.clients * seed + number), version, max_tokens=1)


async def ask(engine: Engine, prompt: list[int], version: Version | None, max_tokens: int) -> Record:
    """One greedy answer of ``max_tokens`` exactly."""
    start = time.perf_counter()
    times = []
    stream = await engine.submit(prompt, version, Sampling(max_tokens, temperature=0.0, ignore_eos=True))
    async for _ in stream:
        times.append(time.perf_counter())
    model = version.variant if version is not None else ""
    return Record(model, Outcome.COMPLETED, start, time.perf_counter(), tuple(times), len(times))


async def answer(engine: Engine, version: Version | None, max_tokens: int) -> list[int]:
    """What an engine says to a fixed prompt, greedily."""
    stream = await engine.submit(
        random_ids(engine, seed=0), version, Sampling(max_tokens, temperature=0.0, ignore_eos=True)
    )
    return [token.token_id async for token in stream]


def random_ids(engine: Engine, seed: int) -> list[int]:
    """A prompt that no other seed shares a prefix with."""
    return random.Random(seed).choices(range(engine.vocab_size), k=PROMPT_TOKENS)
