"""The registry in one SQLite file, for any number of threads and server processes on one machine."""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from deltaserve.delta_store.errors import RegistryUnavailable, VariantNotFound
from deltaserve.delta_store.registry import Receipt, Registered, check_name
from deltaserve.delta_store.registry.migrations import MIGRATIONS

BUSY_SECONDS = 30.0
_CURRENT = "SELECT * FROM versions NATURAL JOIN variants"


class SqliteRegistry:
    """A Registry on one file, which is made if it is not there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        with self._translated():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA foreign_keys = ON")
        self._migrate()

    def register(self, variant: str, receipt: Receipt) -> Registered:
        """Add a version and turn the name to it; a digest that the variant had before is that same version."""
        check_name(variant)
        with self._transaction() as run:
            run.execute(
                """INSERT INTO versions (variant, number, created, digest, receipt)
                SELECT :variant, COALESCE(MAX(number), 0) + 1, :created, :digest, :receipt FROM versions
                WHERE variant = :variant ON CONFLICT (variant, digest) DO NOTHING""",
                {
                    "variant": variant,
                    "created": time.time(),
                    "digest": receipt.digest,
                    "receipt": json.dumps(asdict(receipt)),
                },
            )
            run.execute(
                """INSERT INTO variants SELECT variant, number FROM versions WHERE variant = ? AND digest = ?
                ON CONFLICT (variant) DO UPDATE SET number = excluded.number""",
                (variant, receipt.digest),
            )
            return _registered(run.execute(f"{_CURRENT} WHERE variant = ?", (variant,)).fetchone())

    def current(self, variant: str) -> Registered:
        """The version that the name points at."""
        return self._some(f"{_CURRENT} WHERE variant = ?", variant)[0]

    def versions(self, variant: str) -> Sequence[Registered]:
        """All versions, newest first."""
        return self._some("SELECT * FROM versions WHERE variant = ? ORDER BY number DESC", variant)

    def variants(self) -> Sequence[Registered]:
        """The current version of every variant, by name."""
        with self._transaction("DEFERRED") as run:
            return [_registered(row) for row in run.execute(f"{_CURRENT} ORDER BY variant")]

    def remove(self, variant: str) -> None:
        """Forget the variant with all its versions."""
        with self._transaction() as run:
            if not run.execute("DELETE FROM variants WHERE variant = ?", (variant,)).rowcount:
                raise _not_found(variant)
            run.execute("DELETE FROM versions WHERE variant = ?", (variant,))

    def digests(self) -> set[str]:
        """The artifacts that some version needs."""
        with self._transaction("DEFERRED") as run:
            return {row["digest"] for row in run.execute("SELECT digest FROM versions")}

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def _some(self, query: str, variant: str) -> list[Registered]:
        with self._transaction("DEFERRED") as run:
            rows = run.execute(query, (variant,)).fetchall()
        if not rows:
            raise _not_found(variant)
        return [_registered(row) for row in rows]

    def _migrate(self) -> None:
        with self._transaction() as run:
            run.execute("CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY, applied REAL NOT NULL)")
        for number, statements in enumerate(MIGRATIONS, 1):
            with self._transaction() as run:
                if run.execute("SELECT 1 FROM migrations WHERE number = ?", (number,)).fetchone():
                    continue
                for statement in statements:
                    run.execute(statement)
                run.execute("INSERT INTO migrations VALUES (?, ?)", (number, time.time()))
        with self._transaction("DEFERRED") as run:
            newest = run.execute("SELECT MAX(number) FROM migrations").fetchone()[0]
        if newest > len(MIGRATIONS):
            raise RegistryUnavailable(
                f"{self._path} was written by a newer deltaserve (step {newest}, known are {len(MIGRATIONS)}); upgrade"
            )

    @contextmanager
    def _transaction(self, mode: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """One transaction; IMMEDIATE waits for other writers at its start, where waiting is safe."""
        with self._lock, self._translated():
            self._connection.execute(f"BEGIN {mode}")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise RegistryUnavailable(f"The registry {self._path} does not answer: {error}") from error


def _registered(row: sqlite3.Row) -> Registered:
    return Registered(row["variant"], row["number"], row["created"], Receipt(**json.loads(row["receipt"])))


def _not_found(variant: str) -> VariantNotFound:
    return VariantNotFound(f"There is no variant {variant!r}; GET /v1/variants lists those there are")
