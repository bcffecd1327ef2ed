"""Server-sent events that end well or say why not, and work that stops when its client leaves."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, Self, TypeVar

from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from deltaserve.server.api.errors import described

SLOW_READER_SECONDS = 30.0

T = TypeVar("T")
log = logging.getLogger(__name__)


class SlowReaderError(Exception):
    """The client keeps the connection open and does not read."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``, or None with ``work`` cancelled if the client left before."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of ``data:`` events; the last one is ``[DONE]``, or an error object after a failure.

    ``release`` is called when the stream has ended, however it did. The next event is made once the connection took
    the one before; a client that takes nothing for ``SLOW_READER_SECONDS`` is dropped.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes], release: Callable[[], None], headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events = events
        self._release = release

    @classmethod
    async def started(
        cls, chunks: AsyncGenerator[BaseModel], release: Callable[[], None], headers: Mapping[str, str]
    ) -> Self:
        """The response, once the first chunk is there. What fails before is raised, for an ordinary HTTP status."""
        try:
            first = await anext(chunks)
        except BaseException:
            await chunks.aclose()
            release()
            raise
        return cls(_events(first, chunks), release, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(send))
        except SlowReaderError:
            log.warning("Dropped a client that read nothing for %g s", SLOW_READER_SECONDS)
        finally:
            self._release()

    async def _send_all(self, send: Send) -> None:
        await _in_time(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for event in events:
                await _in_time(send, {"type": "http.response.body", "body": event, "more_body": True})
        await _in_time(send, {"type": "http.response.body", "body": b"", "more_body": False})


async def _in_time(send: Send, message: dict[str, Any]) -> None:
    try:
        async with asyncio.timeout(SLOW_READER_SECONDS):
            await send(message)
    except TimeoutError as error:
        raise SlowReaderError from error


async def _events(first: BaseModel, chunks: AsyncGenerator[BaseModel]) -> AsyncGenerator[bytes]:
    async with aclosing(chunks):
        try:
            yield _chunk(first)
            async for chunk in chunks:
                yield _chunk(chunk)
            yield _event("[DONE]")
        except Exception as error:  # the status is out already: an event is the only way left to tell
            yield _event(json.dumps(described(error)[1]))


def _chunk(chunk: BaseModel) -> bytes:
    kind = getattr(chunk, "type", None)  # of those that have one, the event has it as its name
    return (f"event: {kind}\n".encode() if kind else b"") + _event(chunk.model_dump_json(exclude_unset=True))


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
