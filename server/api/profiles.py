"""Activation profiles: what weighted drop draws its columns from, kept by digest beside the artifacts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import fastapi
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State

from deltaserve.delta_store.errors import BaseMismatch, UploadIncomplete
from deltaserve.delta_store.profile import Profile
from deltaserve.server.api import errors
from deltaserve.server.api.documented import FILE, FILE_BODY
from deltaserve.server.api.responses import ERRORS
from deltaserve.server.api.uploads import receive_file
from deltaserve.server.examination import how_to_send

MAX_PROFILE_BYTES = 64 * 2**20
"""A profile has a byte for each column of each layer's input: 1 MB for a model of 8 billion parameters."""

router = APIRouter(prefix="/v1/profiles", tags=["profiles"], responses=ERRORS)
Digest = Annotated[str, fastapi.Path(pattern="^[0-9a-f]{64}$", description="SHA-256 in lower case hexadecimal")]


@dataclass(frozen=True, slots=True)
class ProfileReceipt:
    """A profile that the server has; ``base`` is the fingerprint of the base it belongs to."""

    digest: str
    base: str


@router.put("/{digest}", status_code=201, openapi_extra=FILE_BODY)
async def put_profile(digest: Digest, request: Request) -> ProfileReceipt:
    """Store the activation profile in the body; its SHA-256 must be ``digest``, and its base the one served here."""
    state = request.app.state
    with state.profiles.workspace() as folder:
        file = folder / "profile"
        found = await receive_file(request, file, min(MAX_PROFILE_BYTES, state.settings.max_upload_bytes))
        if found != digest:
            raise UploadIncomplete(f"The body's SHA-256 is {found}, the address says {digest}; send it again")
        return await run_in_threadpool(keep, file, digest, state)


@router.head("/{digest}", include_in_schema=False)
@router.get("/{digest}", response_class=FileResponse, responses=FILE)
def get_profile(digest: Digest, request: Request) -> Response:
    """The profile's file."""
    path = request.app.state.profiles.fetched(digest)
    if not path.exists():
        return JSONResponse(errors.body(how_to_send(digest), errors.INVALID, "profile_not_found", "digest"), 404)
    return FileResponse(path, media_type="application/octet-stream")


def keep(file: Path, digest: str, state: State) -> ProfileReceipt:
    """Make a profile in a workspace one of the store's, if it belongs to this server's base."""
    profile = Profile.open(file)
    if profile.base != state.engine.fingerprint:
        raise BaseMismatch(
            f"The profile belongs to base {profile.base[:12]}, this server has {state.engine.fingerprint[:12]}"
        )
    with state.profiles.adopt(file, digest):
        return ProfileReceipt(digest, profile.base)
