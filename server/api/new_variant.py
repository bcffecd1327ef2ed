"""``POST /v1/variants``: a variant from a form, from stored files, or from bytes that the server has already."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Self

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.errors import FileNotFound, RequestRefused
from deltaserve.delta_store.pruning.methods import method
from deltaserve.delta_store.selection.tolerance import REPORT_BYTES
from deltaserve.server.api import profiles
from deltaserve.server.api.bounded import counted
from deltaserve.server.api.documented import BINARY, form
from deltaserve.server.api.fields import Between, Body, Text, shown
from deltaserve.server.api.forms import Form
from deltaserve.server.api.jobs import JobObject, answered
from deltaserve.server.api.kinds import is_encoder
from deltaserve.server.api.responses import ERRORS
from deltaserve.server.api.uploads import receive_form
from deltaserve.server.api.variants import VariantReceipt, check_free, encode, register, sender
from deltaserve.server.files.contents import Contents, contents_of
from deltaserve.server.files.links import link
from deltaserve.server.files.store import FileStore
from deltaserve.server.jobs.runner import Made
from deltaserve.server.jobs.store import Job, SearchOrder

DEFAULT_TOLERANCE = {"max_kl": "2%"}
MOST_FILES = 1000
TOLERANCES = ("max_kl", "min_agreement", "bytes")

Nats = Annotated[float, Between(0, 1e6, above=True)]
Percent = Annotated[str, Field(pattern=r"^\d{1,3}(\.\d+)?%$")]

router = APIRouter(prefix="/v1/variants", tags=["variants"], responses=ERRORS)


class FromFiles(Body):
    """One of ``file_id``, ``file_ids`` and ``digest`` (SHA-256 in hex), and for a checkpoint at most one tolerance.

    ``max_kl`` is in nats, or as text a share of the base's own KL (``"2%"``, which is also the default);
    ``min_agreement`` a fraction. ``method`` and its ``options`` narrow the search, as those of ``deltaserve compress``
    do. ``force``: register the nearest artifact where none is within the tolerance.
    """

    name: Text
    file_id: Text | None = None
    file_ids: Annotated[list[Text], Field(min_length=1, max_length=MOST_FILES)] | None = None
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    max_kl: Nats | Percent | None = None
    min_agreement: Annotated[float, Between(0, 1, above=True)] | None = None
    bytes: Annotated[int, Between(REPORT_BYTES + 1, 2**62)] | None = None
    method: Text | None = None
    options: Annotated[dict[str, str | int | float], Field(max_length=32)] | None = None
    force: bool = False

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        given = [name for name in ("file_id", "file_ids", "digest") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestRefused("Give exactly one of 'file_id', 'file_ids' and 'digest'", "file_id")
        if len(limits := [name for name in TOLERANCES if getattr(self, name) is not None]) > 1:
            raise RequestRefused(f"A job has one tolerance, not {' and '.join(limits)}", limits[1])
        return self

    @property
    def tolerance(self) -> dict[str, Any] | None:
        """The one that was given."""
        return next(({name: value} for name in TOLERANCES if (value := getattr(self, name)) is not None), None)


_BODY = form(["name"], name={"type": "string"}, artifact=BINARY, adapter={"type": "array", "items": BINARY})
_BODY["requestBody"]["content"]["application/json"] = {"schema": FromFiles.model_json_schema()}


@router.post(
    "", status_code=201, openapi_extra=_BODY, responses={202: {"model": JobObject, "description": "A job was begun"}}
)
async def post_variant(request: Request, response: Response) -> VariantReceipt | JobObject:
    """Register a variant: from JSON of stored files or a digest, or from a form with the files themselves.

    A form has ``name`` and ``artifact``, or ``adapter`` with a LoRA's two files, encoded on arrival. A whole checkpoint
    is compressed in a job, which the answer (202) shows.
    """
    state = request.app.state
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return await _from_form(request, state)
    body = await _body(request)
    check_free(body.name, state)
    if body.digest is not None:
        return await to_thread.run_sync(_from_digest, body, body.digest, request, limiter=state.examinations)
    ids = [body.file_id] if body.file_id is not None else body.file_ids or []
    with ExitStack() as held:
        files = await run_in_threadpool(_held, state.files, ids, held)
        contents = await run_in_threadpool(contents_of, files)
        if contents.kind == "checkpoint":
            response.status_code = 202
            return await run_in_threadpool(_begin_job, body, contents, request)
        return await to_thread.run_sync(_from_files, body, contents, request, limiter=state.examinations)


async def _from_form(request: Request, state: State) -> VariantReceipt:
    settings = state.settings
    with state.blobs.workspace() as folder:
        received = Form(request.headers.get("content-type", ""), folder, settings.max_upload_parts)
        await receive_form(request, received, settings.max_upload_bytes)
        check_free(received.name, state)
        if received.adapter:
            await to_thread.run_sync(encode, received.adapter, folder / "artifact", state, limiter=state.examinations)
        file = folder / "artifact"
        name, key = received.name, sender(request)
        return await to_thread.run_sync(register, name, file, state, key, limiter=state.examinations)


async def _body(request: Request) -> FromFiles:
    data = await Request(request.scope, counted(request.receive)).body()
    try:
        return FromFiles.model_validate_json(data)
    except ValidationError as error:
        complaints = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise RequestValidationError(complaints) from error


def _held(files: FileStore, ids: Sequence[str], held: ExitStack) -> list[tuple[str, Path]]:
    found = [held.enter_context(files.hold(file_id)) for file_id in ids]
    return [(file.filename, path) for file, path in found]


def _from_digest(body: FromFiles, digest: str, request: Request) -> VariantReceipt:
    """From an artifact that some variant has or had, or from a stored file."""
    state = request.app.state
    _check_no_tolerance(body)
    store = state.blobs if state.blobs.fetched(digest).exists() else state.files.blobs
    if not store.has(digest):
        raise FileNotFound(f"The server has no bytes with the SHA-256 {digest}; send them")
    with store.hold(digest) as path, state.blobs.workspace() as folder:
        link(path, folder / "artifact")
        return register(body.name, folder / "artifact", state, sender(request))


def _from_files(body: FromFiles, contents: Contents, request: Request) -> VariantReceipt:
    """From an artifact or an adapter."""
    state = request.app.state
    _check_no_tolerance(body)
    with state.blobs.workspace() as folder:
        if contents.kind == "artifact":
            link(contents.files["artifact"], folder / "artifact")
        else:
            (folder / "adapter").mkdir()
            for name, path in contents.files.items():
                link(path, folder / "adapter" / name)
            encode(folder / "adapter", folder / "artifact", state)
        return register(body.name, folder / "artifact", state, sender(request))


def _begin_job(body: FromFiles, contents: Contents, request: Request) -> JobObject:
    state = request.app.state
    if is_encoder(state.engine):
        raise RequestRefused(
            f"The base {state.settings.base_name!r} is an encoder: it predicts no tokens, so no tolerance can be "
            "measured. Send what deltaserve compress writes of this checkpoint"
        )
    _check_method(body)
    own = {"config.json": open_checkpoint(state.settings.base).folder / "config.json"}
    job = state.jobs.create(
        body.name,
        {**own, **contents.files},
        contents.text,
        SearchOrder(body.tolerance or DEFAULT_TOLERANCE, body.method, body.options or {}, body.force),
        sender(request),
    )
    state.runner.wake()
    return answered(job)


def register_made(job: Job, made: Made, state: State) -> dict[str, Any]:
    """Register what a job's worker made, with the activation profile that it needs; returns the version's receipt."""
    if made.profile is not None and not state.profiles.fetched(made.profile).exists():
        with state.profiles.workspace() as folder:
            link(made.profile_file, folder / "profile")
            profiles.keep(folder / "profile", made.profile, state)
    return asdict(register(job.variant, made.artifact, state, job.sender))


def _check_method(body: FromFiles) -> None:
    """Refuse at once what the search would refuse later."""
    given = body.options or {}
    if body.method is None:
        if given:
            raise RequestRefused("'options' are those of a method; name it in 'method'", "options")
        return
    chosen = method(body.method)
    for name, value in given.items():
        kind = type(chosen.defaults.get(name, value))
        if not isinstance(value, kind | int if kind is float else kind):
            raise RequestRefused(f"'options.{name}' must be of type {kind.__name__}; got {shown(value)}", "options")
    chosen.options(given)


def _check_no_tolerance(body: FromFiles) -> None:
    given = [*(body.tolerance or {}), *(name for name in ("method", "options", "force") if getattr(body, name))]
    if given:
        raise RequestRefused(
            f"{given[0]!r} is for a whole checkpoint; an artifact or adapter is registered as it is: leave it out",
            given[0],
        )
