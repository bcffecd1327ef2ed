"""The registry in Redis, for replicas on any number of machines.

Each process keeps a copy of where every name points, so that a lookup costs nothing and goes on while Redis is away. A
change is announced to all (pub/sub), and whoever misses the announcement finds it by asking twice a second. A name that
the copy lacks is asked for in Redis itself.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from deltaserve.delta_store.errors import OptionError, RegistryUnavailable
from deltaserve.delta_store.registry import (
    Pointer,
    Receipt,
    Registered,
    check_name,
    check_split,
    redis_scripts,
    variant_not_found,
    version_not_found,
)

CONNECT_SECONDS = 0.75
READ_SECONDS = 0.75
RETRIES = 1
"""A call is tried twice, and so is each try's connection: against a server that never answers it ends in under 4 s."""
POLL_SECONDS = 0.5


class RedisRegistry:
    """A Registry in the database at ``url`` (``redis://``, ``rediss://`` or ``unix://``), below ``prefix``.

    Raises OptionError for a malformed address, RegistryUnavailable if nothing answers there.
    """

    def __init__(self, url: str, prefix: str = "deltaserve") -> None:
        try:
            self._client = redis.Redis.from_url(
                url,
                decode_responses=True,
                socket_connect_timeout=CONNECT_SECONDS,
                socket_timeout=READ_SECONDS,
                retry=Retry(ExponentialBackoff(cap=0.2, base=0.05), RETRIES),
                health_check_interval=15,
            )
        except ValueError as error:
            raise OptionError(f"{_without_password(url)!r} is no address of a Redis registry: {error}") from error
        self._where = _without_password(url)
        self._prefix = f"{{{prefix}}}"
        self._scripts = {
            name: self._client.register_script(getattr(redis_scripts, name))
            for name in ("REGISTER", "POINT", "REMOVE", "SNAPSHOT", "VERSIONS", "DIGESTS")
        }
        self._is_down = False
        self._trying = threading.Lock()
        self._copying = threading.Lock()
        self._closed = threading.Event()
        self._seen: tuple[str, int] = ("", 0)
        self._copy: dict[str, Pointer] = {}
        self._refresh()
        self._follower = threading.Thread(target=self._follow, name="registry", daemon=True)
        self._follower.start()

    def register(self, variant: str, receipt: Receipt) -> Registered:
        """Add a version and turn the name to it; a digest that the variant had before is that same version."""
        check_name(variant)
        number, record = self._run("REGISTER", variant, receipt.digest, repr(time.time()), receipt.to_json())
        self._refresh()
        return _registered(variant, number, record)

    def point(self, variant: str, digest: str, canary: str | None = None, share: float = 0.0) -> Pointer:
        """Turn the name to one of its versions, or to two."""
        check_split(digest, canary, share)
        answer = self._run("POINT", variant, digest, canary or "", repr(share))
        if answer == "variant":
            raise variant_not_found(variant)
        if answer != "done":
            raise version_not_found(variant, digest if canary is None or answer == "version" else canary)
        self._refresh()
        return self.pointer(variant)

    def pointer(self, variant: str) -> Pointer:
        """Where the name points, by this process's copy if that knows the name."""
        if variant not in self._copy and self._newest() != self._seen:
            self._refresh()
        try:
            return self._copy[variant]
        except KeyError:
            raise variant_not_found(variant) from None

    def current(self, variant: str) -> Registered:
        """The version that the name points at, whatever the canary."""
        return self.pointer(variant).current

    def versions(self, variant: str) -> Sequence[Registered]:
        """All versions, newest first."""
        flat = self._run("VERSIONS", variant)
        if not flat:
            raise variant_not_found(variant)
        found = [_registered(variant, *pair) for pair in zip(flat[::2], flat[1::2], strict=True)]
        return sorted(found, key=lambda version: -version.number)

    def variants(self) -> Sequence[Registered]:
        """The current version of every variant, by name, as this process's copy has them."""
        return [pointer.current for _, pointer in sorted(self._copy.items())]

    def remove(self, variant: str) -> None:
        """Forget the variant with all its versions."""
        if not self._run("REMOVE", variant):
            raise variant_not_found(variant)
        self._refresh()

    def digests(self) -> set[str]:
        """The artifacts that some version needs; never from the copy, as blobs are removed by it."""
        return set(self._run("DIGESTS"))

    def check(self) -> None:
        """Raise RegistryUnavailable if Redis does not answer now."""
        self._ask(self._client.ping)

    def close(self) -> None:
        """Stop following, and close the connections."""
        self._closed.set()
        self._follower.join()
        self._client.close()

    def _run(self, script: str, *arguments: str) -> Any:
        return self._ask(lambda: self._scripts[script](keys=[self._prefix], args=arguments))

    def _ask(self, call: Callable[[], Any]) -> Any:
        """While Redis is away one caller at a time waits for it and the others are told at once."""
        if self._closed.is_set():
            raise RegistryUnavailable("The registry is closed")
        with self._one_at_a_time_while_down():
            try:
                answer = call()
            except redis.RedisError as error:
                self._is_down = True
                raise self._unavailable(str(error)) from error
            self._is_down = False
            return answer

    @contextmanager
    def _one_at_a_time_while_down(self) -> Iterator[None]:
        if not self._is_down:
            yield
        elif self._trying.acquire(blocking=False):
            try:
                yield
            finally:
                self._trying.release()
        else:
            raise self._unavailable("it did not answer a moment ago")

    def _unavailable(self, reason: str) -> RegistryUnavailable:
        return RegistryUnavailable(
            f"The registry {self._where} does not answer ({reason}); variants that were served before still are"
        )

    def _newest(self) -> tuple[str, int]:
        """Which state Redis is in: its epoch and generation."""
        epoch, generation = self._ask(lambda: self._client.mget(f"{self._prefix}:epoch", f"{self._prefix}:generation"))
        return epoch or "", int(generation or 0)

    def _refresh(self) -> None:
        """Take what Redis has now as the copy. Replies may overtake each other: an older one is dropped."""
        epoch, generation, rows = self._run("SNAPSHOT", uuid4().hex)
        seen = (epoch, int(generation or 0))
        found = {name: _pointer(name, *row) for name, *row in rows}
        with self._copying:
            if seen[0] != self._seen[0] or seen[1] >= self._seen[1]:
                self._copy, self._seen = found, seen

    def _follow(self) -> None:
        """Listen and poll until closed. Without Redis the copy stays as it is."""
        changes = self._client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        while not self._closed.is_set():
            try:
                if not changes.subscribed:
                    changes.subscribe(f"{self._prefix}:changed")
                changes.get_message(timeout=POLL_SECONDS)
                if self._newest() != self._seen:
                    self._refresh()
            except (redis.RedisError, RegistryUnavailable):
                self._closed.wait(POLL_SECONDS)
        changes.close()


def _pointer(name: str, pointer: str, record: str, canary: str) -> Pointer:
    fields = json.loads(pointer)
    other = _registered(name, fields["canary"], canary) if canary else None
    return Pointer(_registered(name, fields["number"], record), other, float(fields["share"]))


def _registered(variant: str, number: str | int, record: str) -> Registered:
    fields = json.loads(record)
    return Registered(variant, int(number), float(fields["created"]), Receipt.from_json(fields["receipt"]))


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2].partition('?')[0]}"
