"""One SQLite file for any number of threads and processes on one machine: transactions, and numbered migrations."""

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from deltaserve.delta_store.errors import RegistryUnavailable

BUSY_SECONDS = 30.0


class SqliteFile:
    """A file that is made if it is not there, and brought up to the last of ``migrations``.

    A migration is a tuple of statements; one that was released is never edited. Every call raises RegistryUnavailable
    if the file does not answer, or was written by a newer deltaserve.
    """

    def __init__(self, path: Path, migrations: Sequence[Sequence[str]]) -> None:
        self.path = path
        self._lock = threading.Lock()
        with self._translated():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA foreign_keys = ON")
        self._migrate(migrations)

    @contextmanager
    def transaction(self, mode: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """One transaction; IMMEDIATE waits for other writers at its start, where waiting is safe."""
        with self._lock, self._translated():
            self._connection.execute(f"BEGIN {mode}")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def data_version(self) -> int:
        """A number that differs once another connection has changed the file; takes microseconds."""
        with self._lock, self._translated():
            number: int = self._connection.execute("PRAGMA data_version").fetchone()[0]
            return number

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def _migrate(self, migrations: Sequence[Sequence[str]]) -> None:
        with self.transaction() as run:
            run.execute("CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY, applied REAL NOT NULL)")
        for number, statements in enumerate(migrations, 1):
            with self.transaction() as run:
                if run.execute("SELECT 1 FROM migrations WHERE number = ?", (number,)).fetchone():
                    continue
                for statement in statements:
                    run.execute(statement)
                run.execute("INSERT INTO migrations VALUES (?, ?)", (number, time.time()))
        with self.transaction("DEFERRED") as run:
            newest = run.execute("SELECT MAX(number) FROM migrations").fetchone()[0] or 0
        if newest > len(migrations):
            raise RegistryUnavailable(
                f"{self.path} was written by a newer deltaserve (step {newest}, known are {len(migrations)}); upgrade"
            )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise RegistryUnavailable(f"{self.path} does not answer: {error}") from error
