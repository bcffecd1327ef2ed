"""From the generation thread to an event loop: the tokens of one request, then its end."""

import asyncio
from array import array
from collections.abc import Callable, Iterable
from time import perf_counter

from deltaserve.server.engine.requests import Finished, Token

Event = Token | Finished | Exception


class Stream:
    """The tokens of one request, as an async iterator.

    It ends when the request does; then ``finished`` says how. It raises GenerationFailed where the request fails
    midway. Whoever stops reading before the end calls ``cancel``. ``times`` are when its tokens came, on
    ``perf_counter``, whether they were read or not.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, cancel: Callable[[], None]) -> None:
        self.finished: Finished | None = None
        self.times = array("d")
        self._loop, self._cancel = loop, cancel
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._ended = False

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Token:
        if self._ended:
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, Token):
            return event
        self._ended = True
        if isinstance(event, Exception):
            raise event
        self.finished = event
        raise StopAsyncIteration

    def cancel(self) -> None:
        """End the request; what it holds is free within a step. The iterator ends with the reason ``cancelled``.

        May be called at any time, from any thread, more than once.
        """
        self._cancel()


def post(events: Iterable[tuple[Stream, Event]]) -> None:
    """Hand events over to the event loops of their streams, waking each loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Event]]] = {}
    for stream, event in events:
        by_loop.setdefault(stream._loop, []).append((stream, event))
    for loop, batch in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, batch)
        except RuntimeError:  # the loop is closed: nobody can be listening
            for stream, event in batch:
                if isinstance(event, Token):
                    stream.cancel()


def _put(batch: list[tuple[Stream, Event]]) -> None:
    now = perf_counter()
    for stream, event in batch:
        if isinstance(event, Token):
            stream.times.append(now)
        stream._events.put_nowait(event)
