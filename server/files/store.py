"""Stored files: their bytes as blobs under their SHA-256, their names in one SQLite file.

A file's name is only ever told, never used as a path. Two files of the same bytes share one blob.
"""

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from uuid import uuid4

from deltaserve.delta_store.blobs import BlobStore
from deltaserve.delta_store.errors import FileNotFound, UploadError
from deltaserve.delta_store.sqlite_file import SqliteFile

MAX_NAME_BYTES = 255

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE files (
            id TEXT PRIMARY KEY,
            filename TEXT NOT NULL,
            size_bytes INTEGER NOT NULL,
            purpose TEXT NOT NULL,
            sha256 TEXT NOT NULL,
            created REAL NOT NULL,
            expires REAL
        )""",
        "CREATE INDEX files_by_sha256 ON files (sha256)",
        """CREATE TABLE uploads (
            id TEXT PRIMARY KEY,
            filename TEXT NOT NULL,
            size_bytes INTEGER NOT NULL,
            purpose TEXT NOT NULL,
            created REAL NOT NULL,
            expires REAL NOT NULL,
            file_seconds INTEGER,
            status TEXT NOT NULL,
            file TEXT
        )""",
        """CREATE TABLE parts (
            id TEXT PRIMARY KEY,
            upload TEXT NOT NULL REFERENCES uploads (id) ON DELETE CASCADE,
            size_bytes INTEGER NOT NULL,
            sha256 TEXT NOT NULL,
            created REAL NOT NULL
        )""",
    ),
    ("ALTER TABLE uploads ADD COLUMN sha256 TEXT", "CREATE INDEX uploads_by_sha256 ON uploads (sha256)"),
)
"""A step that was released is never edited."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """``created`` and ``expires`` are in Unix seconds; one that has expired is gone."""

    id: str
    filename: str
    size_bytes: int
    purpose: str
    sha256: str
    created: float
    expires: float | None = None


class FileStore:
    """The files under one folder. Safe to use from many threads and processes at once.

    Raises FileNotFound for an id that is unknown or has expired, RegistryUnavailable if the database does not answer.
    """

    def __init__(self, root: Path, database: Path) -> None:
        """Open both, made if they are not there, and clear what crashes left and what has expired."""
        self.blobs = BlobStore(root)
        self.rows = SqliteFile(database, MIGRATIONS)
        self.sweep()

    def add(
        self, received: Path, filename: str, size_bytes: int, purpose: str, sha256: str, seconds: int | None = None
    ) -> StoredFile:
        """Keep a file from a workspace of ``blobs``, for ``seconds`` or until it is removed."""
        now = time.time()
        expires = None if seconds is None else now + seconds
        file = StoredFile(f"file-{uuid4().hex}", filename, size_bytes, purpose, sha256, now, expires)
        with self.blobs.adopt(received, sha256), self.rows.transaction() as run:
            run.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", astuple(file))
        return file

    def get(self, file_id: str) -> StoredFile:
        """The file with this id."""
        found = self._where("id = ?", file_id)
        if not found:
            raise FileNotFound(f"There is no file {file_id[:64]!r}; GET /v1/files lists those there are")
        return found[0]

    def listed(self, purpose: str | None = None, sha256: str | None = None) -> Sequence[StoredFile]:
        """All files, or those with this purpose and these bytes, oldest first."""
        return self._where("purpose = COALESCE(?, purpose) AND sha256 = COALESCE(?, sha256)", purpose, sha256)

    @contextmanager
    def hold(self, file_id: str) -> Iterator[tuple[StoredFile, Path]]:
        """The file, and where its bytes are, which stay there while the block runs."""
        file = self.get(file_id)
        with self.blobs.hold(file.sha256) as path:
            yield file, path

    def remove(self, file_id: str) -> None:
        """Forget a file; its bytes go when no file needs them."""
        self.get(file_id)
        with self.rows.transaction() as run:
            run.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.sweep()

    def sweep(self) -> None:
        """Forget what has expired, and remove the bytes that no file needs."""
        with self.rows.transaction() as run:
            run.execute("DELETE FROM files WHERE expires <= ?", (time.time(),))
        self.blobs.sweep(lambda: {file.sha256 for file in self.listed()})

    def close(self) -> None:
        """Close the database."""
        self.rows.close()

    def _where(self, condition: str, *values: object) -> list[StoredFile]:
        query = f"SELECT * FROM files WHERE {condition} AND COALESCE(expires > ?, TRUE) ORDER BY created, id"
        with self.rows.transaction("DEFERRED") as run:
            return [stored_file(row) for row in run.execute(query, (*values, time.time()))]


def stored_file(row: sqlite3.Row) -> StoredFile:
    """A row of the table of files."""
    return StoredFile(*row)


def check_filename(name: str) -> str:
    """The name, if it is one of a file alone. Raises UploadError for a path, and for what no file is called."""
    if not 0 < len(name.encode(errors="replace")) <= MAX_NAME_BYTES:
        raise UploadError(
            f"A file's name has from 1 to {MAX_NAME_BYTES} bytes; this one has {len(name.encode(errors='replace'))}"
        )
    if name in (".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise UploadError(
            f"{name!r} cannot be a file's name: send the name alone, without folders and control characters"
        )
    return name
