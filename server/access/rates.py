"""How many requests and tokens a minute, and requests at once: of a key, and of a variant.

A prompt's tokens are counted when its request comes, an answer's when it has ended. What the minute has no room for
then is owed, and paid before anything new is let in, so that the mean over time is the limit. Requests at once, and
what is owed, are this server's own; the counters of the minute may be shared (counters.py). A shared storage that does
not answer is replaced by counters in memory for some seconds: limits get looser then, and nobody is turned away.
"""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from starlette.concurrency import run_in_threadpool

from deltaserve.delta_store.errors import AccessError, RequestLimitReached, TokenLimitReached
from deltaserve.server.access.counters import MINUTE, Counters, Room
from deltaserve.server.access.keys import Limits

MEMORY = "memory://"
RETRY_SECONDS = 5.0
"""After a failure of a shared storage it is left alone for so long."""

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose limits these are: ``id`` counts for them, ``label`` is said in messages."""

    id: str
    label: str
    limits: Limits


class Rates:
    """Lets requests in and counts them. Raises OptionError for a storage that there is not."""

    def __init__(self, storage: str = MEMORY) -> None:
        self.is_shared = storage != MEMORY
        self._shared = Counters(storage)
        self._own = Counters(MEMORY) if self.is_shared else self._shared
        self._retry_at = 0.0
        self._running: Counter[str] = Counter()
        self._running_lock = threading.Lock()
        self._owed: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._afterwards = ThreadPoolExecutor(1, "limits")

    async def enter(self, subjects: Sequence[Subject], tokens: int) -> dict[str, str]:
        """Count a request with a prompt of so many tokens for all ``subjects``, or for none; returns OpenAI's headers.

        Whoever entered leaves. Raises RequestLimitReached, TokenLimitReached.
        """
        if not self.is_shared:
            return self._enter(subjects, tokens)
        entered: list[dict[str, str]] = []
        try:
            await run_in_threadpool(lambda: entered.append(self._enter(subjects, tokens)))
        except BaseException:  # a client that left meanwhile: its request was counted all the same
            if entered:
                self.leave(subjects, 0)
            raise
        return entered[0]

    def leave(self, subjects: Sequence[Subject], tokens: int) -> None:
        """The request is over; its answer has so many tokens. Returns at once."""

        def count(counters: Counters) -> None:
            for subject in subjects:
                if subject.limits.tokens is not None:
                    self._take(counters, subject.id, subject.limits.tokens, tokens)

        with self._running_lock:
            for subject in subjects:
                self._running[subject.id] -= 1
                if not self._running[subject.id]:
                    del self._running[subject.id]
        if self.is_shared:
            self._afterwards.submit(self._with_counters, count)
        else:
            self._with_counters(count)

    def close(self) -> None:
        """Count what is still to be counted."""
        self._afterwards.shutdown()

    def _enter(self, subjects: Sequence[Subject], tokens: int) -> dict[str, str]:
        def enter(counters: Counters) -> dict[str, str]:
            rooms = [room for subject in subjects for room in self._check(counters, subject, tokens)]
            for subject in subjects:
                limit = subject.limits.requests
                if limit is not None and not counters.count_request(subject.id, limit):
                    raise _no_request_left(subject.label, counters.requests(subject.id, limit))  # another server's now
                if subject.limits.tokens is not None:
                    self._take(counters, subject.id, subject.limits.tokens, tokens)
            with self._running_lock:
                self._running.update(subject.id for subject in subjects)
            return headers([(kind, Room(r.limit, r.remaining - used, r.reset_s)) for kind, r, used in rooms])

        return self._with_counters(enter)

    def _with_counters(self, work: Callable[[Counters], T]) -> T:
        with self._lock:
            if time.monotonic() >= self._retry_at:
                try:
                    return work(self._shared)
                except self._shared.failures as error:
                    log.warning("The storage of limits does not answer, counting in memory for now: %s", error)
                    self._retry_at = time.monotonic() + RETRY_SECONDS
            return work(self._own)

    def _check(self, counters: Counters, subject: Subject, tokens: int) -> list[tuple[str, Room, int]]:
        """The room that a subject has for each kind, and what this request takes of it."""
        limits, rooms = subject.limits, []
        if limits.concurrent is not None and self._running[subject.id] >= limits.concurrent:
            raise RequestLimitReached(
                f"{subject.label} may have {limits.concurrent} requests at once; wait for one to end",
                headers={"retry-after": "1"},
            )
        if limits.requests is not None:
            room = counters.requests(subject.id, limits.requests)
            rooms.append(("requests", room, 1))
            if room.remaining < 1:
                raise _no_request_left(subject.label, room)
        if limits.tokens is not None:
            self._pay(counters, subject.id, limits.tokens)
            room, owed = counters.tokens(subject.id, limits.tokens), self._owed[subject.id]
            rooms.append(("tokens", room, tokens))
            said = f"{subject.label} may use {limits.tokens} tokens a minute, and this prompt has {tokens}"
            if tokens > limits.tokens:
                raise _refused(TokenLimitReached, f"{said}, which never fits; shorten it", "tokens", room, MINUTE)
            if owed or tokens > room.remaining:
                wait_s = counters.seconds_until(subject.id, limits.tokens, min(tokens + owed, limits.tokens))
                raise _refused(TokenLimitReached, f"{said}; {_later(wait_s)}", "tokens", room, wait_s)
        return rooms

    def _take(self, counters: Counters, subject: str, limit: int, tokens: int) -> None:
        self._owed[subject] += tokens
        self._pay(counters, subject, limit)

    def _pay(self, counters: Counters, subject: str, limit: int) -> None:
        """Count as much of what is owed as the window has room for."""
        if owed := self._owed[subject]:
            payable = min(owed, counters.tokens(subject, limit).remaining)
            if payable and counters.count_tokens(subject, limit, payable):
                self._owed[subject] -= payable
        if not self._owed[subject]:
            del self._owed[subject]


def headers(rooms: Sequence[tuple[str, Room]]) -> dict[str, str]:
    """OpenAI's headers, from the tightest limit of each kind, ``requests`` and ``tokens``."""
    tightest: dict[str, Room] = {}
    for kind, room in sorted(rooms, key=lambda entry: entry[1].remaining / entry[1].limit, reverse=True):
        tightest[kind] = room
    return {
        f"x-ratelimit-{what}-{kind}": said
        for kind, room in tightest.items()
        for what, said in (
            ("limit", str(room.limit)),
            ("remaining", str(max(room.remaining, 0))),
            ("reset", f"{room.reset_s:.3g}s"),
        )
    }


def _no_request_left(label: str, room: Room) -> AccessError:
    said = f"{label} may send {room.limit} requests a minute; {_later(room.reset_s)}"
    return _refused(RequestLimitReached, said, "requests", room, room.reset_s)


def _refused(failure: type[AccessError], message: str, kind: str, room: Room, wait_s: float) -> AccessError:
    return failure(message, headers={"retry-after": str(_seconds(wait_s)), **headers([(kind, room)])})


def _later(wait_s: float) -> str:
    return f"try again in {_seconds(wait_s)} s"


def _seconds(wait_s: float) -> int:
    return max(1, math.ceil(wait_s))
