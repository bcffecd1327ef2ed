"""Residency through the engine: what stays in memory, and what prefixes stay in the cache."""

import asyncio
from dataclasses import replace
from pathlib import Path

from engine_variants import SMALL, collect, greedy, random_prompts, serving, version
from lettered_variants import BASE, PROMPT, VARIANTS, answer, first, until_quiet

from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.requests import Version


async def cached_tokens(engine: Engine, prompt: list[int], on: Version | None) -> int:
    stream = await engine.submit(prompt, on, greedy(1))
    async for _ in stream:
        pass
    assert stream.finished is not None
    return stream.finished.cached_tokens


def test_of_prefixes_the_longest_unused_are_forgotten_first(tmp_path: Path) -> None:
    """A cache of 40 pages, and prompts of 6 pages each: one that is asked for again and again stays."""
    often, *others = random_prompts(16, seed=3, longest=1, shared=0)
    often, others = often * 97, [prompt * 97 for prompt in others]

    async def main(engine: Engine) -> None:
        for prompt in others:
            await collect(engine, prompt, version("a"), greedy(2))
            await collect(engine, often, version("a"), greedy(2))
        assert await cached_tokens(engine, often, version("a")) == 96
        assert await cached_tokens(engine, others[-1], version("a")) == 96
        assert await cached_tokens(engine, others[0], version("a")) == 0
        assert await cached_tokens(engine, often, version("b")) == 0
        assert await collect(engine, PROMPT, version("a"), greedy(20)) == answer("a")

    with serving(BASE, VARIANTS, tmp_path, replace(SMALL, cache_tokens=640)) as engine:
        asyncio.run(main(engine))


def test_d_remove_while_busy_a_slot_is_free_after_n_and_cancelled_requests(tmp_path: Path) -> None:
    async def main(engine: Engine) -> None:
        four = [await engine.submit(PROMPT, version("a"), greedy(60)) for _ in range(4)]
        base = asyncio.create_task(collect(engine, PROMPT, None, greedy(60)))
        await first(four[0])
        engine.forget(version("a").digest)
        waiting = asyncio.create_task(collect(engine, PROMPT, version("b"), greedy(20)))
        for stream in four[:2]:
            stream.cancel()
        rest = [[token.token_id async for token in stream] for stream in four[2:]]
        assert rest == [answer("a", 60)] * 2
        assert await waiting == answer("b")
        assert await base == answer(None, 60)
        await until_quiet(engine)
        assert set(engine.bank.holders) == {version("b").digest}
        assert (engine.tier(version("a").digest), engine.tier(version("b").digest)) == ("store", "resident")

    with serving(BASE, VARIANTS, tmp_path, replace(SMALL, bank_slots=1)) as engine:
        asyncio.run(main(engine))


def test_d_same_name_new_weights_while_the_only_slot_is_busy(tmp_path: Path) -> None:
    """The new version has the spare slot: it does not wait until the old one's request is over."""
    old, new = Version("v", version("a").digest, ""), Version("v", version("b").digest, "")

    async def main(engine: Engine) -> None:
        spanning = await engine.submit(PROMPT, old, greedy(190))
        await first(spanning)
        assert await collect(engine, PROMPT, new, greedy(20)) == answer("b")
        assert spanning.finished is None
        spanning.cancel()
        await until_quiet(engine)
        assert await collect(engine, PROMPT, old, greedy(20)) == answer("a")

    with serving(BASE, VARIANTS, tmp_path, replace(SMALL, bank_slots=1)) as engine:
        asyncio.run(main(engine))
