"""What was used, by day, key and model: added up in one SQLite file by a thread of its own, so that nobody waits."""

import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from deltaserve.delta_store.errors import RegistryUnavailable
from deltaserve.delta_store.sqlite_file import SqliteFile

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE usage (
            day TEXT NOT NULL,
            key TEXT NOT NULL,
            model TEXT NOT NULL,
            requests INTEGER NOT NULL,
            failed INTEGER NOT NULL,
            prompt_tokens INTEGER NOT NULL,
            cached_tokens INTEGER NOT NULL,
            completion_tokens INTEGER NOT NULL,
            PRIMARY KEY (day, key, model)
        ) WITHOUT ROWID""",
    ),
)
"""A step that was released is never edited."""

FLUSH_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Used:
    """What one or more requests used. ``failed`` of the ``requests`` were not finished by the server's fault; of the
    prompt tokens, ``cached_tokens`` were found in the cache."""

    requests: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    def __add__(self, other: "Used") -> "Used":
        return Used(*(one + another for one, another in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class DayUsage:
    """``day`` is a UTC date, ``key`` the key's id, empty where keys are off."""

    day: str
    key: str
    model: str
    used: Used


class Ledger:
    """Adds up usage. ``add`` returns at once; what it was given is on disk within milliseconds, all of it at ``close``.

    A file that does not answer is tried again with what comes next; nothing is lost as long as the process lives.
    """

    def __init__(self, path: Path) -> None:
        self._file = SqliteFile(path, MIGRATIONS)
        self._entries: queue.SimpleQueue[DayUsage | threading.Event | None] = queue.SimpleQueue()
        self._pending: dict[tuple[str, str, str], Used] = {}
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._thread.start()

    def add(self, key: str, model: str, used: Used) -> None:
        """Count it for today."""
        self._entries.put(DayUsage(today().isoformat(), key, model, used))

    def between(self, first: date, last: date, key: str | None = None, model: str | None = None) -> Sequence[DayUsage]:
        """Usage of those days, both included, oldest first. Raises RegistryUnavailable."""
        self.flush()
        with self._file.transaction("DEFERRED") as run:
            rows = run.execute(
                """SELECT * FROM usage WHERE day BETWEEN :first AND :last
                AND key = COALESCE(:key, key) AND model = COALESCE(:model, model) ORDER BY day, key, model""",
                {"first": first.isoformat(), "last": last.isoformat(), "key": key, "model": model},
            ).fetchall()
        return [DayUsage(row[0], row[1], row[2], Used(*row[3:])) for row in rows]

    def flush(self) -> None:
        """Wait until what was added before is on disk, or could not be written."""
        done = threading.Event()
        self._entries.put(done)
        done.wait(FLUSH_SECONDS)

    def close(self) -> None:
        """Write what is left and close the file."""
        self._entries.put(None)
        self._thread.join(FLUSH_SECONDS)
        self._file.close()

    def _run(self) -> None:
        while True:
            batch = [self._entries.get()]
            while not self._entries.empty():
                batch.append(self._entries.get())
            for entry in batch:
                if isinstance(entry, DayUsage):
                    whose = (entry.day, entry.key, entry.model)
                    self._pending[whose] = self._pending[whose] + entry.used if whose in self._pending else entry.used
            self._write()
            for entry in batch:
                if isinstance(entry, threading.Event):
                    entry.set()
            if None in batch:
                return

    def _write(self) -> None:
        if not self._pending:
            return
        try:
            with self._file.transaction() as run:
                run.executemany(
                    """INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
                    requests = requests + excluded.requests, failed = failed + excluded.failed,
                    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
                    cached_tokens = cached_tokens + excluded.cached_tokens,
                    completion_tokens = completion_tokens + excluded.completion_tokens""",
                    [(*whose, *astuple(used)) for whose, used in self._pending.items()],
                )
        except RegistryUnavailable as error:
            log.error("Usage could not be written, trying again with what comes next: %s", error)
        else:
            self._pending.clear()


def today() -> date:
    """The date in UTC."""
    return datetime.now(UTC).date()
