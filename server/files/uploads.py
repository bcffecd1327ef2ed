"""Uploads in parts: each part is on disk before it is answered, so that a client that was cut off sends only the rest.

A pending upload has a folder, ``parts/<upload>/<part>``, below the files' own. Whoever adds a part holds its lock
shared; completing, cancelling and expiring hold it alone.
"""

import fcntl
import hashlib
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

from deltaserve.delta_store.blobs import HashingFile, lock, sync
from deltaserve.delta_store.errors import UploadClosed, UploadError, UploadIncomplete, UploadNotFound, UploadTooLarge
from deltaserve.server.files.store import FileStore, StoredFile

MOST_PARTS = 10_000
RESENT = 2
"""The parts of an upload may have this many times its bytes: some are sent again."""

PIECE_BYTES = 2**20

Status = Literal["pending", "completed", "cancelled", "expired"]


@dataclass(frozen=True, slots=True)
class Upload:
    """Times in Unix seconds. ``file_seconds``: how long the finished file is kept, None is for ever.

    ``sha256`` of the whole file, where whoever began it said so.
    """

    id: str
    filename: str
    size_bytes: int
    purpose: str
    created: float
    expires: float
    file_seconds: int | None
    status: Status
    file: str | None
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Part:
    """A part that is on disk."""

    id: str
    upload: str
    size_bytes: int
    sha256: str
    created: float


class Uploads:
    """The uploads into one FileStore. Raises UploadNotFound, and UploadClosed for one that is not pending any more."""

    def __init__(self, files: FileStore, seconds: float) -> None:
        """``seconds`` is how long an upload may stay pending."""
        self._files, self._rows, self._seconds = files, files.rows, seconds
        self._parts = files.blobs.root / "parts"
        self._parts.mkdir(exist_ok=True)
        self.sweep()

    def create(
        self, filename: str, size_bytes: int, purpose: str, file_seconds: int | None, sha256: str | None = None
    ) -> Upload:
        """Begin an upload. Raises UploadTooLarge where the disk has no room for it."""
        self.sweep()
        free = shutil.disk_usage(self._parts).free
        if size_bytes > free:
            raise UploadTooLarge(f"The upload has {size_bytes} bytes, the server's disk has room for {free}")
        now = time.time()
        upload = Upload(
            f"upload_{uuid4().hex}",
            filename,
            size_bytes,
            purpose,
            now,
            now + self._seconds,
            file_seconds,
            "pending",
            None,
            sha256,
        )
        (self._parts / upload.id).mkdir()
        with self._rows.transaction() as run:
            run.execute("INSERT INTO uploads VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", astuple(upload))
        return upload

    def get(self, upload_id: str) -> Upload:
        """The upload with this id."""
        with self._rows.transaction("DEFERRED") as run:
            return _upload(run, upload_id)

    def pending(self, sha256: str | None = None) -> Sequence[Upload]:
        """Those that parts may still be added to, of a file with these bytes or of any, oldest first."""
        query = """SELECT * FROM uploads WHERE status = 'pending' AND expires > ? AND (sha256 = ? OR ? IS NULL)
            ORDER BY created, id"""
        with self._rows.transaction("DEFERRED") as run:
            return [Upload(*row) for row in run.execute(query, (time.time(), sha256, sha256))]

    def parts(self, upload_id: str) -> Sequence[Part]:
        """What is there of a pending upload, oldest first."""
        with self._rows.transaction("DEFERRED") as run:
            rows = run.execute("SELECT * FROM parts WHERE upload = ? ORDER BY created, id", (upload_id,))
            return [Part(*row) for row in rows]

    def check_room(self, upload: Upload, size_bytes: int) -> None:
        """Raise UploadTooLarge for a part that would be too much."""
        parts = self.parts(upload.id)
        if len(parts) >= MOST_PARTS:
            raise UploadTooLarge(f"The upload {upload.id} has {MOST_PARTS} parts, the most that it may have")
        if size_bytes + sum(part.size_bytes for part in parts) > RESENT * upload.size_bytes:
            raise UploadTooLarge(
                f"The parts of {upload.id} would have more than {RESENT} times the {upload.size_bytes} bytes announced"
            )

    def add_part(self, upload_id: str, received: Path, size_bytes: int, sha256: str) -> Part:
        """Keep a part from a workspace of the files' blobs."""
        part = Part(f"part_{uuid4().hex}", upload_id, size_bytes, sha256, time.time())
        with self._pending(upload_id, fcntl.LOCK_SH) as upload:
            self.check_room(upload, size_bytes)
            sync(received)
            received.replace(self._parts / upload_id / part.id)
            with self._rows.transaction() as run:
                run.execute("INSERT INTO parts VALUES (?, ?, ?, ?, ?)", astuple(part))
        return part

    def complete(self, upload_id: str, part_ids: Sequence[str], md5: str | None) -> tuple[Upload, StoredFile]:
        """Join the parts in this order into a file. Asked again, it answers the same.

        Raises UploadIncomplete, with all parts still there, where the bytes are not as many as announced or have
        another SHA-256 or MD5.
        """
        upload = self.get(upload_id)
        if upload.status == "completed" and upload.file:
            return upload, self._files.get(upload.file)
        with self._pending(upload_id, fcntl.LOCK_EX) as upload, self._files.blobs.workspace() as folder:
            parts = self._in_order(upload, part_ids)
            digest = self._join(parts, folder / "file", upload, md5)
            file = self._files.add(
                folder / "file", upload.filename, upload.size_bytes, upload.purpose, digest, upload.file_seconds
            )
            self._close(upload_id, "completed", file.id)
        return self.get(upload_id), file

    def cancel(self, upload_id: str) -> Upload:
        """Remove all its parts; cancelling a cancelled upload changes nothing."""
        if self.get(upload_id).status != "cancelled":
            with self._pending(upload_id, fcntl.LOCK_EX):
                self._close(upload_id, "cancelled")
        return self.get(upload_id)

    def sweep(self) -> None:
        """End the uploads whose time is up, and remove parts that crashes left."""
        with self._rows.transaction("DEFERRED") as run:
            pending = {
                row["id"]: row["expires"] for row in run.execute("SELECT * FROM uploads WHERE status = 'pending'")
            }
        for upload_id in [one for one, expires in pending.items() if expires <= time.time()]:
            with lock(self._parts / upload_id, fcntl.LOCK_EX | fcntl.LOCK_NB) as unused:
                if unused:
                    self._close(upload_id, "expired")
        for folder in self._parts.iterdir():
            if folder.name not in pending and time.time() - folder.stat().st_mtime > self._seconds:
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _pending(self, upload_id: str, kind: int) -> Iterator[Upload]:
        """The upload, which stays pending while the block runs unless the block itself ends it."""
        self.get(upload_id)  # an id that is in the database is no path of somebody's making
        with lock(self._parts / upload_id, kind):
            upload = self.get(upload_id)
            if upload.status == "pending" and upload.expires <= time.time():
                self._close(upload_id, "expired")
                upload = self.get(upload_id)
            if upload.status != "pending":
                raise UploadClosed(f"The upload {upload_id} is {upload.status}; begin a new one")
            yield upload

    def _in_order(self, upload: Upload, part_ids: Sequence[str]) -> list[Part]:
        known = {part.id: part for part in self.parts(upload.id)}
        if unknown := [part_id for part_id in part_ids if part_id not in known]:
            raise UploadError(
                f"The upload {upload.id} has no part {unknown[0][:64]!r}; GET /v1/uploads/{upload.id} lists them"
            )
        parts = [known[part_id] for part_id in part_ids]
        found = sum(part.size_bytes for part in parts)
        if found != upload.size_bytes:
            raise UploadIncomplete(
                f"The parts have {found} bytes together, {upload.size_bytes} were announced; send the rest"
            )
        return parts

    def _join(self, parts: Sequence[Part], path: Path, upload: Upload, md5: str | None) -> str:
        check = hashlib.md5(usedforsecurity=False)
        with HashingFile(path) as joined:
            for part in parts:
                with (self._parts / upload.id / part.id).open("rb") as opened:
                    while piece := opened.read(PIECE_BYTES):
                        joined.write(piece)
                        check.update(piece)
        if md5 and md5.strip().lower() != check.hexdigest():
            raise UploadIncomplete(
                f"The file's MD5 is {check.hexdigest()}, {md5[:64]} was announced; send the parts again"
            )
        if upload.sha256 not in (None, joined.digest):
            raise UploadIncomplete(
                f"The file's SHA-256 is {joined.digest}, {upload.sha256} was announced; send the parts again"
            )
        return joined.digest

    def _close(self, upload_id: str, status: Status, file: str | None = None) -> None:
        with self._rows.transaction() as run:
            run.execute("UPDATE uploads SET status = ?, file = ? WHERE id = ?", (status, file, upload_id))
            run.execute("DELETE FROM parts WHERE upload = ?", (upload_id,))
        shutil.rmtree(self._parts / upload_id, ignore_errors=True)


def _upload(run: sqlite3.Connection, upload_id: str) -> Upload:
    row = run.execute("SELECT * FROM uploads WHERE id = ?", (upload_id,)).fetchone()
    if row is None:
        raise UploadNotFound(f"There is no upload {upload_id[:64]!r}; begin one with POST /v1/uploads")
    return Upload(*row)
