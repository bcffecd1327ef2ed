"""Which variants should be in memory: hints and pins, and where each one is now."""

from dataclasses import dataclass
from typing import Literal

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State

from deltaserve.delta_store.errors import ArtifactError, GenerationFailed
from deltaserve.server.api.responses import ERRORS
from deltaserve.server.api.served import current
from deltaserve.server.engine.bank import Tier
from deltaserve.server.engine.requests import Version

router = APIRouter(prefix="/v1/variants", tags=["variants"], responses=ERRORS)


@dataclass(frozen=True, slots=True)
class Residency:
    """Where a variant's current version is: in memory (``resident``), on its way there, open on the host, or stored."""

    id: str
    object: Literal["variant.residency"]
    tier: Tier
    pinned: bool


@router.post("/{name:path}/prefetch", status_code=202)
async def prefetch(name: str, request: Request) -> Residency:
    """Load a variant as soon as there is a place that nobody uses; returns at once. A hint: no request waits for it."""
    state = request.app.state
    version = await run_in_threadpool(_current, state, name)
    state.engine.bank.prefetch(version)
    return residency(state, name, version.digest)


@router.put("/{name:path}/pin")
async def pin(name: str, request: Request) -> Residency:
    """Load a variant and keep it in memory, this version and later ones, until it is unpinned or removed."""
    state = request.app.state
    version = await keep(state, name)
    return residency(state, name, version.digest)


@router.delete("/{name:path}/pin")
async def unpin(name: str, request: Request) -> Residency:
    """Let a variant be evicted like all others."""
    state = request.app.state
    version = await run_in_threadpool(_current, state, name)
    state.engine.bank.unpin(name)
    return residency(state, name, version.digest)


def residency(state: State, name: str, digest: str) -> Residency:
    """Of a variant whose current version has this digest."""
    return Residency(name, "variant.residency", state.engine.tier(digest), is_pinned(state, name))


def is_pinned(state: State, name: str) -> bool:
    """Whether this variant's current version stays in memory."""
    return name in state.engine.bank.pinned


async def keep(state: State, name: str) -> Version:
    """Pin a variant and wait until it is loaded. Raises VariantNotFound, RequestRefused, GenerationFailed."""
    version = await run_in_threadpool(_current, state, name)
    try:
        await state.engine.bank.keep(version)
    except ArtifactError as error:
        raise GenerationFailed(f"The model {name!r} cannot be loaded: {error}") from error
    return version


def follow(state: State, name: str, digest: str) -> None:
    """The name of a variant turned to this version: load it now if the variant is pinned."""
    if is_pinned(state, name):
        state.engine.bank.prefetch(Version(name, digest, str(state.blobs.path(digest))))


def _current(state: State, name: str) -> Version:
    registered = current(state, name)
    return Version(name, registered.digest, str(state.blobs.path(registered.digest)))
