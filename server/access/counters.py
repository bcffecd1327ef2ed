"""Counts of the last minute, by the library limits: in memory, or in Redis for several servers together.

Requests have a moving window, exact to each. Tokens have a sliding counter, whose cost does not grow with their number:
the minute before counts as much as it is still within the last sixty seconds.
"""

import time
from dataclasses import dataclass
from typing import Any

from limits import RateLimitItemPerMinute
from limits.errors import ConfigurationError
from limits.storage import storage_from_string
from limits.strategies import MovingWindowRateLimiter, SlidingWindowCounterRateLimiter

from deltaserve.delta_store.errors import OptionError

MINUTE = 60
REDIS_SECONDS = 1.0
"""How long to wait for Redis, to connect and for each answer."""


@dataclass(frozen=True, slots=True)
class Room:
    """What is left of one limit, and in how many seconds there is more."""

    limit: int
    remaining: int
    reset_s: float


class Counters:
    """Counters in ``storage``, a URL that the library limits understands. Raises OptionError for another.

    Calls block for as long as the storage needs, and raise one of ``failures`` where it does not answer.
    """

    def __init__(self, storage: str) -> None:
        options: dict[str, Any] = {}
        if "redis" in storage.partition(":")[0]:
            options = {"socket_timeout": REDIS_SECONDS, "socket_connect_timeout": REDIS_SECONDS}
        try:
            self._storage: Any = storage_from_string(storage, **options)
        except (ConfigurationError, ValueError, TypeError) as error:
            raise OptionError(f"The counters of limits cannot be kept in {storage!r}: {error}") from error
        self.failures: type[Exception] | tuple[type[Exception], ...] = self._storage.base_exceptions
        self._requests = MovingWindowRateLimiter(self._storage)
        self._tokens = SlidingWindowCounterRateLimiter(self._storage)

    def requests(self, subject: str, limit: int) -> Room:
        """What a subject has left of ``limit`` requests a minute."""
        stats = self._requests.get_window_stats(_item(limit), subject, "requests")
        return Room(limit, stats.remaining, max(stats.reset_time - time.time(), 0.0))

    def count_request(self, subject: str, limit: int) -> bool:
        """One more, if there is room; tells whether there was."""
        return self._requests.hit(_item(limit), subject, "requests")

    def tokens(self, subject: str, limit: int) -> Room:
        """What a subject has left of ``limit`` tokens a minute."""
        stats = self._tokens.get_window_stats(_item(limit), subject, "tokens")
        return Room(limit, stats.remaining, self.seconds_until(subject, limit, limit))

    def count_tokens(self, subject: str, limit: int, number: int) -> bool:
        """So many more, if there is room for all of them; tells whether there was."""
        return self._tokens.hit(_item(limit), subject, "tokens", cost=number)

    def seconds_until(self, subject: str, limit: int, wanted: int) -> float:
        """How long until there is room for ``wanted`` tokens, if no others are counted."""
        key = _item(limit).key_for(subject, "tokens")
        before, before_s, current, current_s = self._storage.get_sliding_window(key, MINUTE)
        room, rolls_s = limit - wanted, max(current_s - MINUTE, 0.0)
        if current > room:  # only once the current window has become the one before, and then fades
            return float(rolls_s + MINUTE * (1 - room / current))
        return float(max(before_s - MINUTE * (room - current) / before, 0.0)) if before else 0.0


def _item(limit: int) -> RateLimitItemPerMinute:
    return RateLimitItemPerMinute(limit, namespace="deltaserve")
