"""Variants: upload, list, look at, remove.

An upload becomes a version only when it is whole and has passed the examination; of one that fails nothing is left. A
request keeps the version that its variant's name pointed at when it arrived: a version's file goes when its variant is
removed, or if a request holds it then, at the next removal or start after that request.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.datastructures import State

from deltaserve.delta_store.errors import InvalidName
from deltaserve.delta_store.registry import Registered, check_name
from deltaserve.server.api.documented import FILE_BODY
from deltaserve.server.api.residency import follow, is_pinned
from deltaserve.server.api.responses import ERRORS
from deltaserve.server.api.uploads import receive_file
from deltaserve.server.engine.bank import Tier
from deltaserve.server.examination import examine, told_of_the_upload

ACTIONS = ("versions", "rollback", "split", "alias", "pin", "prefetch")
"""Last parts of addresses below a variant's own (versions.py)."""

router = APIRouter(prefix="/v1/variants", tags=["variants"], responses=ERRORS)


@dataclass(frozen=True, slots=True)
class VariantReceipt:
    """A registered version. ``base`` is the fingerprint of the base it was made for, ``created`` is in Unix seconds.

    ``tensors_applied`` of the artifact's ``tensors_total`` tensors change a layer of the served model. ``tier``: where
    this version is now (residency.py); ``pinned``: whether the variant's current version stays in memory.
    ``uploaded_by`` is the name of the API key that it came with, null where keys are off.
    """

    id: str
    object: Literal["variant"]
    version: int
    created: int
    digest: str
    size_bytes: int
    base: str
    base_matches: bool
    profile: str | None
    tensors_applied: int
    tensors_total: int
    quality: dict[str, Any] | None
    uploaded_by: str | None
    tier: Tier
    pinned: bool


@dataclass(frozen=True, slots=True)
class VariantList:
    """The current version of every variant."""

    object: Literal["list"]
    data: list[VariantReceipt]


@dataclass(frozen=True, slots=True)
class VariantVersions:
    """A variant's current version, and all of them, newest first."""

    id: str
    object: Literal["variant"]
    current: VariantReceipt
    versions: list[VariantReceipt]


@dataclass(frozen=True, slots=True)
class VariantRemoved:
    """A variant that is no more."""

    id: str
    object: Literal["variant"]
    deleted: bool


@router.put("/{name:path}", status_code=201, openapi_extra=FILE_BODY)
async def put_variant(name: str, request: Request) -> VariantReceipt:
    """Register the artifact in the body as the newest version of ``name``.

    The body's SHA-256 may be announced (``?digest=``, ``X-Checksum-Sha256`` or ``Repr-Digest``) and is then checked.
    """
    state = request.app.state
    check_free(name, state)
    with state.blobs.workspace() as folder:
        await receive_file(request, folder / "artifact", state.settings.max_upload_bytes)
        file = folder / "artifact"
        return await to_thread.run_sync(register, name, file, state, sender(request), limiter=state.examinations)


@router.get("")
def list_variants(request: Request) -> VariantList:
    """Every variant, also those whose ``base_matches`` is false, which cannot be asked here."""
    return VariantList("list", [receipt(one, request.app.state) for one in request.app.state.registry.variants()])


@router.get("/{name:path}")
def get_variant(name: str, request: Request) -> VariantVersions:
    """A variant with its versions."""
    state = request.app.state
    current = receipt(state.registry.current(name), state)
    return VariantVersions(name, "variant", current, [receipt(one, state) for one in state.registry.versions(name)])


@router.delete("/{name:path}")
def delete_variant(name: str, request: Request) -> VariantRemoved:
    """Remove a variant with all its versions; requests that run are finished, new ones are answered 404."""
    state = request.app.state
    digests = {version.digest for version in state.registry.versions(name)}
    state.registry.remove(name)
    state.engine.bank.unpin(name)
    state.blobs.sweep(state.registry.digests)
    for digest in digests - state.registry.digests():
        state.engine.forget(digest)
    return VariantRemoved(name, "variant", True)


def check_free(name: str, state: State) -> None:
    """Raise InvalidName for a name that no variant can have here."""
    if name.rpartition("/")[2] in ACTIONS and "/" in name:
        raise InvalidName(f"{name!r} ends in what the API calls an action; give the variant another name")
    if check_name(name) == state.settings.base_name:
        raise InvalidName(f"{name!r} is the base's own id; give the variant another name")


def encode(adapter: Path, artifact: Path, state: State) -> None:
    """Write the artifact of a LoRA folder. Errors speak of the upload, not of a path that its sender does not know."""
    from deltaserve.delta_store.compress import compress

    with told_of_the_upload(adapter):
        compress(state.settings.base, adapter, artifact, measure=False)  # whoever uploads waits


def sender(request: Request) -> str | None:
    """The name of the API key that a request came with; None where keys are off."""
    return request.state.key.name if request.state.key else None


def register(name: str, file: Path, state: State, uploaded_by: str | None = None) -> VariantReceipt:
    """Examine an artifact in a workspace, keep it, and turn the name to it."""
    found = replace(examine(file, state.engine, state.settings.base, state.profiles), uploaded_by=uploaded_by)
    with state.blobs.adopt(file, found.digest):
        registered = state.registry.register(name, found)
        follow(state, name, registered.digest)
        return receipt(registered, state)


def receipt(version: Registered, state: State) -> VariantReceipt:
    """What is told about a version."""
    return VariantReceipt(
        id=version.variant,
        object="variant",
        version=version.number,
        created=int(version.created),
        base_matches=version.receipt.base == state.engine.fingerprint,
        tier=state.engine.tier(version.digest),
        pinned=is_pinned(state, version.variant),
        **asdict(version.receipt),
    )
