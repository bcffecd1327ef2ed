"""One sequence from several that grow at the same time."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


async def merged(sources: Sequence[Callable[[], Awaitable[T | None]]]) -> AsyncGenerator[tuple[int, T]]:
    """Each source's items with the source's index, in the order in which they come; None ends a source.

    A source is asked for its next item when the one before was taken, so at most one item a source is kept.
    The first failure of a source is raised here.
    """
    asked = {asyncio.ensure_future(_ask(source)): index for index, source in enumerate(sources)}
    try:
        while asked:
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: asked[task]):
                index, item = asked.pop(task), task.result()
                if item is not None:
                    yield index, item
                    asked[asyncio.ensure_future(_ask(sources[index]))] = index
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def _ask(source: Callable[[], Awaitable[T | None]]) -> T | None:
    return await source()
