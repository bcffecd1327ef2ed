"""What an engine survives: failures of a step, of a row, and the end."""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_variants import collect, greedy, random_variant, serving, version
from lettered_variants import BASE, PROMPT, VARIANTS, answer, first, pages_in_use, until_quiet

from deltaserve.delta_store.errors import (
    EngineDown,
    GenerationFailed,
)
from deltaserve.server.engine.engine import Engine


@contextmanager
def breaking_forward(engine: Engine, after: int, times: int = 1) -> Iterator[None]:
    """The model raises in its forward, ``after`` calls from now, ``times`` times."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if after < calls <= after + times:
            raise RuntimeError("a kernel broke")

    handle = engine._batching.model.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_an_exception_in_the_forward_fails_what_runs_and_the_engine_goes_on(engine: Engine) -> None:
    async def main() -> None:
        await collect(engine, PROMPT, version("a"), greedy(1))  # loaded, so that all three run when it breaks
        with breaking_forward(engine, after=50):
            streams = [await engine.submit(PROMPT, on, greedy(100)) for on in (None, version("a"), None)]
            for stream in streams:
                with pytest.raises(GenerationFailed, match="a kernel broke"):
                    [token async for token in stream]
                assert stream.finished is None
            async with asyncio.timeout(5):
                while not engine.ready():
                    await asyncio.sleep(0.01)
            assert await collect(engine, PROMPT, version("a"), greedy(20)) == answer("a")

    asyncio.run(main())


def test_an_engine_that_never_finishes_a_step_stays_down_and_says_why(tmp_path: Path) -> None:
    async def main(engine: Engine) -> None:
        with breaking_forward(engine, after=0, times=10**9):
            for _ in range(30):
                try:
                    await collect(engine, PROMPT, None, greedy(3))
                except GenerationFailed:
                    await asyncio.sleep(0.05)
                except EngineDown:
                    if "stays down" in (engine.failure or ""):
                        break
                    await asyncio.sleep(0.05)
        assert not engine.ready()
        assert "a kernel broke" in (engine.failure or "")
        with pytest.raises(EngineDown, match="stays down"):
            await engine.submit(PROMPT, None, greedy(3))

    with serving(BASE, VARIANTS, tmp_path) as engine:
        asyncio.run(main(engine))


def test_a_row_that_is_not_finite_fails_alone(tmp_path: Path) -> None:
    broken = random_variant(BASE, "dense", seed=9)
    for delta in broken.deltas.values():
        delta.parts[0].values.data.fill_(torch.nan)  # type: ignore[union-attr]

    async def main(engine: Engine) -> None:
        neighbours = [asyncio.create_task(collect(engine, PROMPT, on, greedy(60))) for on in (None, version("a"))]
        for _ in range(3):
            with pytest.raises(GenerationFailed, match="not finite"):
                await collect(engine, PROMPT, version("nan"), greedy(5))
        assert [await n for n in neighbours] == [answer(None, 60), answer("a", 60)]
        await until_quiet(engine)
        assert pages_in_use(engine) == 0

    with serving(BASE, VARIANTS | {version("nan").digest: broken}, tmp_path) as engine:
        asyncio.run(main(engine))


def test_stopping_fails_what_runs_and_refuses_what_comes(tmp_path: Path) -> None:
    async def main(engine: Engine) -> None:
        stream = await engine.submit(PROMPT, version("a"), greedy(190))
        await first(stream)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(GenerationFailed):
            [token async for token in stream]
        with pytest.raises(EngineDown, match="stopped"):
            await engine.submit(PROMPT, None, greedy(1))
        assert not engine.ready()

    with serving(BASE, VARIANTS, tmp_path) as engine:
        asyncio.run(main(engine))
    gc.collect()
