"""The registry in one SQLite file, for any number of threads and server processes on one machine."""

import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

from deltaserve.delta_store.registry import (
    Pointer,
    Receipt,
    Registered,
    check_name,
    check_split,
    variant_not_found,
    version_not_found,
)
from deltaserve.delta_store.registry.migrations import MIGRATIONS
from deltaserve.delta_store.sqlite_file import SqliteFile

_CURRENT = "SELECT versions.* FROM versions NATURAL JOIN variants"
_VERSIONS = "SELECT * FROM versions WHERE variant = ? ORDER BY number DESC"


class SqliteRegistry:
    """A Registry on one file, which is made if it is not there."""

    def __init__(self, path: Path) -> None:
        self._file = SqliteFile(path, MIGRATIONS)

    def register(self, variant: str, receipt: Receipt) -> Registered:
        """Add a version and turn the name to it; a digest that the variant had before is that same version."""
        check_name(variant)
        with self._file.transaction() as run:
            run.execute(
                """INSERT INTO versions (variant, number, created, digest, receipt)
                SELECT :variant, COALESCE(MAX(number), 0) + 1, :created, :digest, :receipt FROM versions
                WHERE variant = :variant ON CONFLICT (variant, digest) DO NOTHING""",
                {
                    "variant": variant,
                    "created": time.time(),
                    "digest": receipt.digest,
                    "receipt": receipt.to_json(),
                },
            )
            run.execute(
                """INSERT INTO variants (variant, number) SELECT variant, number FROM versions
                WHERE variant = ? AND digest = ?
                ON CONFLICT (variant) DO UPDATE SET number = excluded.number, canary = NULL, share = 0""",
                (variant, receipt.digest),
            )
            return _registered(run.execute(f"{_CURRENT} WHERE variant = ?", (variant,)).fetchone())

    def point(self, variant: str, digest: str, canary: str | None = None, share: float = 0.0) -> Pointer:
        """Turn the name to one of its versions, or to two."""
        check_split(digest, canary, share)
        with self._file.transaction() as run:
            _pointer(run, variant)
            found = {row["digest"]: _registered(row) for row in run.execute(_VERSIONS, (variant,))}
            for one in (digest, canary):
                if one is not None and one not in found:
                    raise version_not_found(variant, one)
            pointer = Pointer(found[digest], None if canary is None else found[canary], share)
            numbers = (pointer.current.number, pointer.canary and pointer.canary.number)
            run.execute(
                "UPDATE variants SET number = ?, canary = ?, share = ? WHERE variant = ?", (*numbers, share, variant)
            )
        return pointer

    def pointer(self, variant: str) -> Pointer:
        """Where the name points."""
        with self._file.transaction("DEFERRED") as run:
            return _pointer(run, variant)

    def current(self, variant: str) -> Registered:
        """The version that the name points at, whatever the canary."""
        return self.pointer(variant).current

    def versions(self, variant: str) -> Sequence[Registered]:
        """All versions, newest first."""
        with self._file.transaction("DEFERRED") as run:
            _pointer(run, variant)
            return [_registered(row) for row in run.execute(_VERSIONS, (variant,))]

    def variants(self) -> Sequence[Registered]:
        """The current version of every variant, by name."""
        with self._file.transaction("DEFERRED") as run:
            return [_registered(row) for row in run.execute(f"{_CURRENT} ORDER BY variant")]

    def remove(self, variant: str) -> None:
        """Forget the variant with all its versions."""
        with self._file.transaction() as run:
            if not run.execute("DELETE FROM variants WHERE variant = ?", (variant,)).rowcount:
                raise variant_not_found(variant)
            run.execute("DELETE FROM versions WHERE variant = ?", (variant,))

    def digests(self) -> set[str]:
        """The artifacts that some version needs."""
        with self._file.transaction("DEFERRED") as run:
            return {row["digest"] for row in run.execute("SELECT digest FROM versions")}

    def check(self) -> None:
        """Whether the file can be read now."""
        with self._file.transaction("DEFERRED") as run:
            run.execute("SELECT 1 FROM variants LIMIT 1")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _pointer(run: sqlite3.Connection, variant: str) -> Pointer:
    row = run.execute("SELECT * FROM variants WHERE variant = ?", (variant,)).fetchone()
    if row is None:
        raise variant_not_found(variant)
    query = "SELECT * FROM versions WHERE variant = ? AND number = ?"
    current, canary = (
        number and _registered(run.execute(query, (variant, number)).fetchone())
        for number in (row["number"], row["canary"])
    )
    return Pointer(current, canary, row["share"])


def _registered(row: sqlite3.Row) -> Registered:
    return Registered(row["variant"], row["number"], row["created"], Receipt.from_json(row["receipt"]))
