"""How peers.py loads the servers that it compares, in turns: whoever is not asked is stopped."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from many_variants import Served
from serving import spread

from deltaserve.server.bench.client import Ask, Asking, Record, send
from deltaserve.server.bench.load import open_client
from deltaserve.server.bench.prompts import random_prompts
from deltaserve.server.bench.statistics import figures

ASKING = Asking(max_tokens=24, ignore_eos=True, timeout_s=120.0)
PROMPT_WORDS = 32
WARM_AT_ONCE = 16
WARM_SEED = 1_000_000

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Contestant:
    """``models`` are (server, name), asked in turn."""

    system: str
    variants: int
    models: list[tuple[Served, str]]


def compared(contestants: Sequence[Contestant], concurrency: Sequence[int], repeats: int) -> list[Row]:
    """Every contestant at every concurrency once a repeat, after one short request to each model."""
    measured: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for contestant in contestants:
        warm(contestant)
    for repeat in range(repeats):
        for clients in concurrency:
            for contestant in contestants[:: -1 if repeat % 2 else 1]:
                with alone(contestant, contestants):
                    found = measure(contestant, clients, seed=100 * repeat + clients)  # no prompt is asked twice
                measured.setdefault((contestant.system, clients), []).append(found)
                what = f"  {contestant.system}, {clients} concurrent, repeat {repeat + 1} of {repeats}"
                print(f"{what}: {found[0]:.1f} tokens/s, TTFT {found[1]:.0f} ms", flush=True)
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


@contextmanager
def alone(asked: Contestant, contestants: Sequence[Contestant]) -> Iterator[None]:
    """All other servers stand still: vLLM looks for work with 0.4 of a core for seconds after its last answer."""
    own = {server.url for server, _ in asked.models}
    others = {server.url: server for one in contestants for server, _ in one.models if server.url not in own}
    processes = [process for server in others.values() for process in server.processes()]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def warm(contestant: Contestant) -> None:
    short = Asking(max_tokens=2, ignore_eos=True)
    asyncio.run(ask(contestant, WARM_AT_ONCE, max(WARM_AT_ONCE, len(contestant.models)), seed=WARM_SEED, asking=short))


def measure(contestant: Contestant, clients: int, seed: int) -> tuple[float, float, float]:
    """Tokens a second, median TTFT and TPOT in milliseconds; ends the script where a request failed."""
    found = figures(asyncio.run(ask(contestant, clients, max(4, 2 * clients), seed)))
    if found.failed_share or found.tokens_per_s is None or found.ttft is None or found.tpot is None:
        raise SystemExit(f"{contestant.system}: {found.reasons}; the piece is not reported")
    return found.tokens_per_s, found.ttft.median, found.tpot.median


async def ask(
    contestant: Contestant, concurrency: int, requests: int, seed: int, asking: Asking = ASKING
) -> list[Record]:
    """``requests`` requests to the models in turn, ``concurrency`` at a time over all of their servers."""
    prompts = random_prompts(PROMPT_WORDS, requests, seed)
    records: list[Record] = []
    async with AsyncExitStack() as stack:
        urls = {server.url for server, _ in contestant.models}
        clients = {url: await stack.enter_async_context(open_client(url)) for url in urls}
        waiting = zip(cycle(contestant.models), prompts, strict=False)

        async def one_client() -> None:
            for (server, model), prompt in waiting:
                records.append(await send(clients[server.url], asking, Ask(model, prompt)))

        await asyncio.gather(*(one_client() for _ in range(concurrency)))
    return records
