"""Stopping without breaking anything off: what runs is finished within a limit, nothing new is taken."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)

TOLD_SECONDS = 5.0


class Draining:
    """Counts the requests that run. ``begin`` is called when the server is told to stop."""

    def __init__(self, limit_s: float) -> None:
        self.begun = False
        self.running = 0
        self._limit_s = limit_s
        self._until = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """While one request runs."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def begin(self) -> None:
        """Take nothing new from now on."""
        if not self.begun:
            self.begun, self._until = True, time.monotonic() + self._limit_s
            log.info("Stopping: %d requests have %g s to finish", self.running, self._limit_s)

    @property
    def is_over(self) -> bool:
        """Whether nothing runs any more, or the time is up."""
        return self.begun and (not self.running or time.monotonic() >= self._until)


class DrainingServer(uvicorn.Server):
    """Told to stop, it goes on listening until its requests are finished, so that new ones are told instead of dropped.

    When their time is up, the engine stops: streams end with an error event. A second signal ends it at once.

    It also ends some seconds after the engine has: until then whoever asks learns why.
    """

    _ends: float | None = None

    def __init__(self, config: uvicorn.Config, app: "FastAPI") -> None:
        super().__init__(config)
        self._app = app

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; true ends the server."""
        draining: Draining = self._app.state.draining
        if self._is_past_use():
            return True
        if await super().on_tick(counter):
            draining.begin()
        if not draining.is_over and not self.force_exit:
            return False
        if draining.running and not self.force_exit:
            log.warning("%d requests did not finish in time", draining.running)
            await asyncio.to_thread(self._app.state.engine.stop)
        return True

    def _is_past_use(self) -> bool:
        if self._app.state.engine.ended is None:
            return False
        self._ends = self._ends or time.monotonic() + TOLD_SECONDS
        return time.monotonic() >= self._ends

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal begins to stop, the second does not wait."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._captured_signals.append(sig)
