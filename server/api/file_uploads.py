"""OpenAI's Uploads: a large file in parts, which stay if the client is cut off; joined and checked at the end."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from deltaserve.delta_store.errors import FileNotFound, UploadError, UploadTooLarge
from deltaserve.server.api import files
from deltaserve.server.api.bounded import BoundedRoute
from deltaserve.server.api.documented import BINARY, form
from deltaserve.server.api.fields import Between, Body, Text
from deltaserve.server.api.files import FileObject, Purpose
from deltaserve.server.api.multipart import Multipart
from deltaserve.server.api.responses import ERRORS
from deltaserve.server.api.uploads import disk_room, receive_form
from deltaserve.server.files.store import StoredFile, check_filename
from deltaserve.server.files.uploads import MOST_PARTS, Part, Upload, Uploads

FORM_BYTES = 2**16
"""What a form has around its file, at most."""

router = APIRouter(tags=["files"], responses=ERRORS)
bounded = APIRouter(route_class=BoundedRoute)


class ExpiresAfter(Body):
    """How long the finished file is kept."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Between(*files.EXPIRY_SECONDS)]


class NewUpload(Body):
    """A file that will be sent in parts. ``mime_type`` is OpenAI's, and has no effect.

    ``sha256``, which OpenAI does not have, is of the whole file: checked at the end, and what a client that was cut off
    finds the upload by.
    """

    filename: Text
    bytes: Annotated[int, Field(ge=1)]
    mime_type: Text
    purpose: Purpose
    expires_after: ExpiresAfter | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None


class Completion(Body):
    """``part_ids`` in the order of the file; ``md5`` of the whole file, in hex, is checked."""

    part_ids: Annotated[list[str], Field(min_length=1, max_length=MOST_PARTS)]
    md5: Annotated[str, Field(pattern="^[0-9a-fA-F]{32}$")] | None = None


@dataclass(frozen=True, slots=True)
class PartObject:
    """A part that is on the server's disk."""

    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class UploadObject:
    """An upload; ``file`` is there once it is completed, ``parts`` while it is pending."""

    id: str
    object: Literal["upload"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None
    parts: list[PartObject]


@dataclass(frozen=True, slots=True)
class UploadList:
    """Pending uploads, oldest first."""

    object: Literal["list"]
    data: list[UploadObject]


@bounded.post("/v1/uploads")
def create_upload(body: NewUpload, request: Request) -> UploadObject:
    """Begin to send a file in parts."""
    settings = request.app.state.settings
    if body.bytes > settings.max_file_bytes:
        raise UploadTooLarge(
            f"The file has {body.bytes} bytes; at most {settings.max_file_bytes} are taken (DELTASERVE_MAX_FILE_BYTES)"
        )
    seconds = body.expires_after.seconds if body.expires_after else None
    name = check_filename(body.filename)
    return answered(_uploads(request).create(name, body.bytes, body.purpose, seconds, body.sha256))


@router.get("/v1/uploads")
def list_uploads(
    request: Request,
    sha256: Annotated[
        str | None, Query(pattern="^[0-9a-f]{64}$", description="Only of files that were announced with it")
    ] = None,
) -> UploadList:
    """The uploads that are not complete yet, with the parts that have come: what need not be sent again."""
    uploads = _uploads(request)
    return UploadList("list", [_with_parts(upload, uploads) for upload in uploads.pending(sha256)])


@router.get("/v1/uploads/{upload_id}")
def get_upload(upload_id: str, request: Request) -> UploadObject:
    """An upload with the parts that have come: what a client that was cut off need not send again."""
    uploads = _uploads(request)
    upload = uploads.get(upload_id)
    with suppress(FileNotFound):  # it may have been removed since
        return answered(upload, request.app.state.files.get(upload.file or ""))
    return _with_parts(upload, uploads)


@router.post("/v1/uploads/{upload_id}/parts", openapi_extra=form(["data"], data=BINARY))
async def add_part(upload_id: str, request: Request) -> PartObject:
    """Add a part, in any order and several at once."""
    state = request.app.state
    uploads = _uploads(request)
    upload = await run_in_threadpool(uploads.get, upload_id)
    await run_in_threadpool(uploads.check_room, upload, 1)
    most = min(state.settings.max_upload_bytes, upload.size_bytes + FORM_BYTES)
    with state.files.blobs.workspace() as folder:
        received = PartForm(request.headers.get("content-type", ""), folder, state.settings.max_upload_parts)
        await receive_form(request, received, most)
        data = received.files[0]
        part = await run_in_threadpool(uploads.add_part, upload_id, data.path, data.size_bytes, data.sha256)
    return part_answered(part)


@bounded.post("/v1/uploads/{upload_id}/complete")
def complete_upload(upload_id: str, body: Completion, request: Request) -> UploadObject:
    """Join the parts into a file."""
    with disk_room():
        upload, file = _uploads(request).complete(upload_id, body.part_ids, body.md5)
    return answered(upload, file)


@router.post("/v1/uploads/{upload_id}/cancel")
def cancel_upload(upload_id: str, request: Request) -> UploadObject:
    """End an upload and remove its parts."""
    return answered(_uploads(request).cancel(upload_id))


class PartForm(Multipart):
    """A form with one file, ``data``."""

    def __init__(self, content_type: str, folder: Path, max_parts: int) -> None:
        self._folder = folder
        super().__init__(content_type, max_parts, "'data' (the part's bytes)", self._placed)

    def close(self) -> None:
        """The body has ended: is the part there?"""
        super().close()
        if not self.files or not self.files[0].size_bytes:
            raise UploadError("A form has 'data' (the part's bytes), which are not empty")

    def _placed(self, part: str, filename: str) -> Path | None:
        if part != "data":
            raise UploadError(f"Part {part!r} is not expected here; a form has 'data' (the part's bytes)")
        return self._folder / "part"


def answered(upload: Upload, file: StoredFile | None = None, parts: list[PartObject] | None = None) -> UploadObject:
    """What is told about an upload."""
    return UploadObject(
        upload.id,
        "upload",
        upload.size_bytes,
        int(upload.created),
        int(upload.expires),
        upload.filename,
        upload.purpose,
        upload.status,
        files.answered(file) if file else None,
        parts or [],
    )


def _with_parts(upload: Upload, uploads: Uploads) -> UploadObject:
    return answered(upload, None, [part_answered(part) for part in uploads.parts(upload.id)])


def part_answered(part: Part) -> PartObject:
    """What is told about a part."""
    return PartObject(part.id, "upload.part", int(part.created), part.upload, part.size_bytes, part.sha256)


def _uploads(request: Request) -> Uploads:
    uploads: Uploads = request.app.state.uploads
    return uploads


router.include_router(bounded)
