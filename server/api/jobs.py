"""Compression jobs: list, look at, cancel, follow. ``POST /v1/variants`` with a checkpoint begins one."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from time import monotonic
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import TypeAdapter
from starlette.concurrency import run_in_threadpool

from deltaserve.delta_store.errors import JobNotFound
from deltaserve.server.api.paging import page
from deltaserve.server.api.responses import ERRORS, ErrorBody
from deltaserve.server.jobs.store import Job, Status

POLL_SECONDS = 0.25
"""How often a listener asks whether some job has changed; jobs are read only then."""

ALIVE_SECONDS = 15.0
"""A comment is sent after so long without an event, so that nobody on the way takes the stream for dead."""

MOST_LISTED = 1000

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=ERRORS)


@dataclass(frozen=True, slots=True)
class PointObject:
    """An artifact that was tried: its size and what it loses on ``text`` (short, calibration or held-out).

    ``kl`` is in nats a token; ``setting`` is in the words of ``deltaserve compress``.
    """

    bytes: int
    kl: float
    agreement: float
    setting: str
    text: str


@dataclass(frozen=True, slots=True)
class JobObject:
    """A checkpoint on its way to a variant. ``progress`` is an estimate; times in Unix seconds.

    Of one that succeeded ``result`` is the version's receipt and ``quality`` its report.
    """

    id: str
    object: Literal["job"]
    status: Status
    stage: str
    progress: float
    variant: str
    created_at: int
    finished_at: int | None
    tolerance: dict[str, Any]
    points: list[PointObject]
    result: dict[str, Any] | None
    quality: dict[str, Any] | None
    error: ErrorBody | None


_JSON = TypeAdapter(JobObject)


@dataclass(frozen=True, slots=True)
class JobList:
    """Newest first; ``has_more``: the next ones are asked for with ``after`` set to the last one's id."""

    object: Literal["list"]
    data: list[JobObject]
    has_more: bool


@router.get("")
def list_jobs(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 100,
    after: Annotated[str | None, Query(description="The id of the last job of the list before")] = None,
) -> JobList:
    """The jobs, newest first."""
    some, has_more = page(request.app.state.jobs.listed(), after, limit, JobNotFound)
    return JobList("list", [answered(job) for job in some], has_more)


@router.get("/{job_id}")
def get_job(job_id: str, request: Request) -> JobObject:
    """How far a job is."""
    return answered(request.app.state.jobs.get(job_id))


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, request: Request) -> JobObject:
    """End a job; its worker is gone within a second, and nothing is registered."""
    return answered(request.app.state.jobs.cancel(job_id))


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def follow_job(job_id: str, request: Request) -> StreamingResponse:
    """The job as a server-sent event at each change; the stream ends with its last state, or when the server stops."""
    job = await run_in_threadpool(request.app.state.jobs.get, job_id)
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(_events(job, request.app.state), media_type="text/event-stream", headers=headers)


async def _events(job: Job, state: Any) -> AsyncIterator[str]:
    sent: Job | None = None
    seen = None
    at = monotonic()
    while True:
        revision = await run_in_threadpool(state.jobs.revision)
        if revision != seen:  # asked before the job is read: what changes in between is read once more
            job, seen = await run_in_threadpool(state.jobs.get, job.id), revision
        if job != sent:
            yield f"data: {_JSON.dump_json(answered(job)).decode()}\n\n"
            sent, at = job, monotonic()
        elif monotonic() - at > ALIVE_SECONDS:
            yield ": still there\n\n"
            at = monotonic()
        if job.is_over or state.draining.begun:
            return
        await asyncio.sleep(POLL_SECONDS)


def answered(job: Job) -> JobObject:
    """What is told about a job."""
    return JobObject(
        id=job.id,
        object="job",
        status=job.status,
        stage=job.stage,
        progress=round(job.progress, 4),
        variant=job.variant,
        created_at=int(job.created),
        finished_at=None if job.finished is None else int(job.finished),
        tolerance=job.search.tolerance,
        points=[PointObject(**point) for point in job.points],
        result=job.result,
        quality=job.result and job.result["quality"],
        error=None if job.error is None else ErrorBody(**job.error),
    )
