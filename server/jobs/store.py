"""The jobs and how far each is, in one SQLite file; a job that is not over has a folder with its input.

Whoever runs a job holds the lock of its folder. One that is ``running`` and whose lock is free was interrupted: it is
begun again, and its search goes on from its journal.
"""

import json
import shutil
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from deltaserve.delta_store.errors import JobFinished, JobNotFound
from deltaserve.delta_store.sqlite_file import SqliteFile
from deltaserve.server.files.links import link

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]

CHECKPOINT = "checkpoint"
TEXT = "text.jsonl"
GRACE_SECONDS = 60.0
REGISTER = "Register"
"""The last stage, in which a job cannot be cancelled any more."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE jobs (
            number INTEGER PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            variant TEXT NOT NULL,
            sender TEXT,
            search TEXT NOT NULL,
            created REAL NOT NULL,
            finished REAL,
            starts INTEGER NOT NULL DEFAULT 0,
            status TEXT NOT NULL DEFAULT 'queued',
            stage TEXT NOT NULL DEFAULT '',
            progress REAL NOT NULL DEFAULT 0,
            points TEXT NOT NULL DEFAULT '[]',
            result TEXT,
            error TEXT
        )""",
    ),
)
"""A step that was released is never edited."""


@dataclass(frozen=True, slots=True)
class SearchOrder:
    """``tolerance`` is one limit by its name; ``method`` and ``options`` narrow the search as those of compress do.

    ``force``: the nearest artifact will do where none is within the tolerance.
    """

    tolerance: dict[str, Any]
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    force: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """``search`` says what to look for; ``points`` were tried; ``starts`` counts how often it was begun.

    ``sender`` is the name of the key that it came with. Times in Unix seconds.
    """

    id: str
    variant: str
    sender: str | None
    search: SearchOrder
    created: float
    finished: float | None
    starts: int
    status: Status
    stage: str
    progress: float
    points: list[dict[str, Any]]
    result: dict[str, Any] | None
    error: dict[str, Any] | None

    @property
    def is_over(self) -> bool:
        return self.status not in ("queued", "running")


class JobStore:
    """The jobs under one folder, for any number of threads and processes on one machine. Raises JobNotFound."""

    def __init__(self, root: Path, database: Path) -> None:
        """Open both, made if they are not there, and remove the folders of jobs that are over."""
        self._root = root
        root.mkdir(parents=True, exist_ok=True)
        self._rows = SqliteFile(database, MIGRATIONS)
        self._changes = 0
        kept = {job.id for job in self.waiting()}
        for folder in root.iterdir():
            new = time.time() - folder.stat().st_mtime < GRACE_SECONDS  # its row may be about to be written
            if folder.is_dir() and folder.name not in kept and not new:
                shutil.rmtree(folder, ignore_errors=True)

    def folder(self, job_id: str) -> Path:
        """Where a job's input is, and what its worker writes."""
        return self._root / job_id

    def create(
        self,
        variant: str,
        files: Mapping[str, Path],
        text: Path | None,
        search: SearchOrder,
        sender: str | None = None,
    ) -> Job:
        """A new job for a checkpoint of these ``files``, by name, which it links to: they may be removed at once."""
        job_id = f"job_{uuid4().hex}"
        folder = self.folder(job_id)
        try:
            (folder / CHECKPOINT).mkdir(parents=True)
            for name, path in files.items():
                link(path, folder / CHECKPOINT / name)
            if text:
                link(text, folder / TEXT)
            with self._rows.transaction() as run:
                run.execute(
                    "INSERT INTO jobs (id, variant, sender, search, created) VALUES (?, ?, ?, ?, ?)",
                    (job_id, variant, sender, json.dumps(asdict(search)), time.time()),
                )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return self.get(job_id)

    def get(self, job_id: str) -> Job:
        """The job with this id."""
        found = self._where("id = ?", job_id)
        if not found:
            raise JobNotFound(f"There is no job {job_id[:64]!r}; GET /v1/jobs lists those there are")
        return found[0]

    def revision(self) -> tuple[int, int]:
        """What differs once some job has changed, here or in another process; takes microseconds, reads no job."""
        return self._changes, self._rows.data_version()

    def listed(self) -> Sequence[Job]:
        """All jobs, newest first."""
        return self._where("TRUE")[::-1]

    def waiting(self) -> Sequence[Job]:
        """Those that are not over, oldest first: queued, running here or elsewhere, or interrupted."""
        return self._where("status IN ('queued', 'running')")

    def begin(self, job_id: str) -> bool:
        """Count one more start; False if the job is over."""
        return self._changed(
            "UPDATE jobs SET status = 'running', starts = starts + 1 WHERE id = ? AND status IN ('queued', 'running')",
            job_id,
        )

    def report(self, job_id: str, stage: str, progress: float, points: Sequence[Mapping[str, Any]] | None) -> bool:
        """How far a running job is; ``points`` None leaves them. False if it does not run any more."""
        return self._changed(
            """UPDATE jobs SET stage = ?, progress = ?, points = COALESCE(?, points)
            WHERE id = ? AND status = 'running'""",
            stage,
            progress,
            None if points is None else json.dumps(points),
            job_id,
        )

    def succeed(self, job_id: str, result: Mapping[str, Any]) -> None:
        """The variant is registered."""
        self._changed(
            "UPDATE jobs SET status = 'succeeded', progress = 1, result = ?, finished = ? WHERE id = ?",
            json.dumps(result),
            time.time(),
            job_id,
        )
        self.clear(job_id)

    def fail(self, job_id: str, error: Mapping[str, Any]) -> None:
        """``error`` is OpenAI's error object."""
        self._changed(
            "UPDATE jobs SET status = 'failed', error = ?, finished = ? WHERE id = ? AND status = 'running'",
            json.dumps(error),
            time.time(),
            job_id,
        )
        self.clear(job_id)

    def cancel(self, job_id: str) -> Job:
        """Whoever runs it will end its worker. Raises JobFinished where it is too late."""
        cancelled = self._changed(
            """UPDATE jobs SET status = 'cancelled', finished = ?
            WHERE id = ? AND status IN ('queued', 'running') AND stage <> ?""",
            time.time(),
            job_id,
            REGISTER,
        )
        job = self.get(job_id)
        if not cancelled and job.status != "cancelled":
            state = "registers its variant" if job.status == "running" else f"has {job.status}"
            raise JobFinished(f"The job {job_id} {state}; it cannot be cancelled any more")
        if job.starts == 0:
            self.clear(job_id)
        return job

    def clear(self, job_id: str) -> None:
        """Remove the folder of a job that is over."""
        shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def close(self) -> None:
        """Close the database."""
        self._rows.close()

    def _changed(self, statement: str, *values: object) -> bool:
        with self._rows.transaction() as run:
            self._changes += 1
            return run.execute(statement, values).rowcount > 0

    def _where(self, condition: str, *values: object) -> list[Job]:
        with self._rows.transaction("DEFERRED") as run:
            return [_job(row) for row in run.execute(f"SELECT * FROM jobs WHERE {condition} ORDER BY number", values)]


def _job(row: sqlite3.Row) -> Job:
    return Job(
        id=row["id"],
        variant=row["variant"],
        sender=row["sender"],
        search=SearchOrder(**json.loads(row["search"])),
        created=row["created"],
        finished=row["finished"],
        starts=row["starts"],
        status=row["status"],
        stage=row["stage"],
        progress=row["progress"],
        points=json.loads(row["points"]),
        result=row["result"] and json.loads(row["result"]),
        error=row["error"] and json.loads(row["error"]),
    )
