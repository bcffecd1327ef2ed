"""OpenAI's Files: send, list, read, delete. Their bytes are streamed to disk and kept under their SHA-256."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from deltaserve.delta_store.errors import FileNotFound, RequestRefused, UploadError
from deltaserve.server.api.documented import BINARY, FILE, form
from deltaserve.server.api.multipart import Multipart, ReceivedFile
from deltaserve.server.api.paging import page
from deltaserve.server.api.responses import ERRORS
from deltaserve.server.api.uploads import receive_form
from deltaserve.server.files.store import FileStore, StoredFile, check_filename

Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
"""OpenAI's; here they are kept and told, and decide nothing."""

EXPIRY_SECONDS = (3600, 30 * 24 * 3600)
MOST_LISTED = 10_000
_EXPECTED = "'file' (a file) and 'purpose', and maybe 'expires_after[anchor]' and 'expires_after[seconds]'"
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")

router = APIRouter(prefix="/v1/files", tags=["files"], responses=ERRORS)


@dataclass(frozen=True, slots=True)
class FileObject:
    """A stored file; times in Unix seconds. ``sha256`` is of its bytes, in hex."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    sha256: str


@dataclass(frozen=True, slots=True)
class FileList:
    """``has_more``: the next ones are asked for with ``after`` set to ``last_id``."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


@dataclass(frozen=True, slots=True)
class FileDeleted:
    """A file that is no more."""

    id: str
    object: Literal["file"]
    deleted: bool


_FORM = form(
    ["file", "purpose"],
    file=BINARY,
    purpose={"type": "string", "enum": list(get_args(Purpose))},
    **{
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer"},
    },
)


@router.post("", openapi_extra=_FORM)
async def create_file(request: Request) -> FileObject:
    """Store the file in the form."""
    state = request.app.state
    files: FileStore = state.files
    with files.blobs.workspace() as folder:
        filled = FileForm(request.headers.get("content-type", ""), folder, state.settings.max_upload_parts)
        await receive_form(request, filled, state.settings.max_upload_bytes)
        received = filled.received
        file = await run_in_threadpool(
            files.add,
            received.path,
            received.filename,
            received.size_bytes,
            filled.fields["purpose"],
            received.sha256,
            filled.seconds,
        )
    return answered(file)


@router.get("")
def list_files(
    request: Request,
    purpose: Annotated[str | None, Query(description="Only of this purpose")] = None,
    sha256: Annotated[
        str | None, Query(pattern="^[0-9a-f]{64}$", description="Only those with these bytes: is it there already?")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = MOST_LISTED,
    order: Annotated[Literal["asc", "desc"], Query(description="By time")] = "desc",
    after: Annotated[str | None, Query(description="The id of the last file of the list before")] = None,
) -> FileList:
    """The stored files, newest first."""
    found = list(request.app.state.files.listed(purpose, sha256))
    if order == "desc":
        found.reverse()
    some, has_more = page(found, after, limit, FileNotFound)
    data = [answered(file) for file in some]
    return FileList("list", data, data[0].id if data else None, data[-1].id if data else None, has_more)


@router.get("/{file_id}")
def get_file(file_id: str, request: Request) -> FileObject:
    """What is known of a file."""
    return answered(request.app.state.files.get(file_id))


@router.get("/{file_id}/content", response_class=FileResponse, responses=FILE)
def get_content(file_id: str, request: Request) -> FileResponse:
    """A file's bytes."""
    with ExitStack() as holding:
        file, path = holding.enter_context(request.app.state.files.hold(file_id))
        held = holding.pop_all()
    return FileResponse(
        path,
        media_type="application/octet-stream",
        filename=file.filename,  # as an attachment: no browser opens it
        headers={"x-content-type-options": "nosniff"},
        background=BackgroundTask(held.close),
    )


@router.delete("/{file_id}")
def delete_file(file_id: str, request: Request) -> FileDeleted:
    """Remove a file; variants and jobs that were made from it stay."""
    request.app.state.files.remove(file_id)
    return FileDeleted(file_id, "file", True)


class FileForm(Multipart):
    """``received``, ``seconds`` and the field ``purpose`` are right once it is closed."""

    def __init__(self, content_type: str, folder: Path, max_parts: int) -> None:
        self._folder = folder
        super().__init__(content_type, max_parts, _EXPECTED, self._placed)

    def close(self) -> None:
        """The body has ended: is everything there?"""
        super().close()
        if not self.files or not self.fields.get("purpose"):
            raise UploadError(f"A form has {_EXPECTED}")
        check_purpose(self.fields["purpose"])
        anchor, seconds = (self.fields.get(f"expires_after[{name}]", "") for name in ("anchor", "seconds"))
        if (anchor or seconds) and not (anchor == "created_at" and seconds.isascii() and seconds.isdigit()):
            raise RequestRefused("'expires_after' has anchor 'created_at' and seconds, a whole number", "expires_after")
        self.seconds = check_seconds(int(seconds)) if seconds else None

    @property
    def received(self) -> ReceivedFile:
        return self.files[0]

    def _placed(self, part: str, filename: str) -> Path | None:
        if part in _FIELDS:
            return None
        if part != "file":
            raise UploadError(f"Part {part!r} is not expected here; a form has {_EXPECTED}")
        check_filename(filename)
        return self._folder / "file"


def check_purpose(purpose: str) -> None:
    """Raise RequestRefused for one that OpenAI does not have."""
    if purpose not in get_args(Purpose):
        raise RequestRefused(
            f"'purpose' must be one of {', '.join(get_args(Purpose))}; got {purpose[:64]!r}", "purpose"
        )


def check_seconds(seconds: int) -> int:
    """How long a file is to be kept, if it may be."""
    least, most = EXPIRY_SECONDS
    if not least <= seconds <= most:
        raise RequestRefused(
            f"'expires_after.seconds' must be from {least} to {most}; got {seconds}", "expires_after.seconds"
        )
    return seconds


def answered(file: StoredFile) -> FileObject:
    """What is told about a file."""
    return FileObject(
        file.id,
        "file",
        file.size_bytes,
        int(file.created),
        None if file.expires is None else int(file.expires),
        file.filename,
        file.purpose,
        "processed",
        file.sha256,
    )
