"""A tiny base with the variants a, b and c, what each must say, and what an engine has under way."""

import asyncio

from engine_variants import alone, random_variant, version
from tiny_models import tiny_llama

from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.requests import Token
from deltaserve.server.engine.stream import Stream

PROMPT = [5, 9, 33, 2]
BASE = tiny_llama()
VARIANTS = {version(name).digest: random_variant(BASE, "dense", seed) for seed, name in enumerate("abc", start=1)}


def answer(name: str | None, count: int = 20) -> list[int]:
    """What the merged model says to ``PROMPT``."""
    return alone(BASE if name is None else VARIANTS[version(name).digest].merged, PROMPT, count)


async def until_quiet(engine: Engine) -> None:
    async with asyncio.timeout(5):
        while engine.requests or any(engine.bank.holders.values()):
            await asyncio.sleep(0.01)


def pages_in_use(engine: Engine) -> int:
    (allocator,) = engine._batching.batch_processor.cache.cache_allocators.values()
    return sum(map(len, allocator.block_table.values()))


async def first(stream: Stream) -> Token:
    return await anext(aiter(stream))
