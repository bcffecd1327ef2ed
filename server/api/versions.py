"""The versions of a variant: list, roll back, split requests between two, give one another name.

A version never changes; these routes turn names. Requests that run keep the version they began with.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.datastructures import State

from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.registry import Pointer, version_not_found
from deltaserve.server.api.fields import Body
from deltaserve.server.api.residency import follow
from deltaserve.server.api.responses import ERRORS
from deltaserve.server.api.variants import VariantReceipt, check_free, receipt, sender

router = APIRouter(prefix="/v1/variants", tags=["variants"], responses=ERRORS)
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="Digest of one of the variant's versions")]


@dataclass(frozen=True, slots=True)
class Versions:
    """All versions of a variant, newest first. ``current`` and ``canary`` are digests; ``share`` is the canary's."""

    object: Literal["list"]
    variant: str
    current: str
    canary: str | None
    share: float
    data: list[VariantReceipt]


class Rollback(Body):
    """Which version: ``digest``, or the newest one that is older than the current one."""

    digest: Digest | None = None


class Split(Body):
    """``canary`` gets ``share`` of the requests, the current version the others."""

    canary: Digest
    share: float = Field(gt=0, lt=1, description="Of the requests, between 0 and 1")


class Alias(Body):
    """``alias`` becomes a variant whose name points at ``digest``, or at this variant's current version."""

    alias: str
    digest: Digest | None = None


@router.get("/{name:path}/versions")
def list_versions(name: str, request: Request) -> Versions:
    """A variant's versions, and where its name points."""
    state = request.app.state
    return _versions(state, name, state.registry.pointer(name))


@router.post("/{name:path}/rollback")
def roll_back(name: str, request: Request, body: Rollback | None = None) -> Versions:
    """Turn the name to an earlier version, or to a given one; this ends a split."""
    state = request.app.state
    digest = body.digest if body else None
    pointer = state.registry.point(name, digest or _before_current(state, name))
    follow(state, name, pointer.current.digest)
    return _versions(state, name, pointer)


@router.post("/{name:path}/split")
def split(name: str, request: Request, body: Split) -> Versions:
    """Send a share of the requests to another version, until the name is turned or something is uploaded.

    Requests with the same ``user`` always get the same version, and keep the canary while its share grows; those
    without are drawn at random.
    """
    state = request.app.state
    current = state.registry.current(name).digest
    return _versions(state, name, state.registry.point(name, current, body.canary, body.share))


@router.delete("/{name:path}/split")
def end_split(name: str, request: Request) -> Versions:
    """Send all requests to the current version again; where there is no split, nothing changes."""
    state = request.app.state
    current = state.registry.current(name).digest
    return _versions(state, name, state.registry.point(name, current))


@router.post("/{name:path}/alias", status_code=201)
def alias(name: str, request: Request, body: Alias) -> VariantReceipt:
    """Let another name point at a version of this variant, as an upload of the same bytes under that name would."""
    state = request.app.state
    check_free(body.alias, state)
    digest = body.digest or state.registry.current(name).digest
    version = next((one for one in state.registry.versions(name) if one.digest == digest), None)
    if version is None:
        raise version_not_found(name, digest)
    with state.blobs.hold(digest):
        named = replace(version.receipt, uploaded_by=sender(request))
        return receipt(state.registry.register(body.alias, named), state)


def _before_current(state: State, name: str) -> str:
    current = state.registry.current(name)
    older = [one for one in state.registry.versions(name) if one.number < current.number]
    if not older:
        raise OptionError(f"The variant {name!r} has no version before the current one, number {current.number}")
    digest: str = older[0].digest
    return digest


def _versions(state: State, name: str, pointer: Pointer) -> Versions:
    canary = pointer.canary.digest if pointer.canary else None
    data = [receipt(one, state) for one in state.registry.versions(name)]
    return Versions("list", name, pointer.current.digest, canary, pointer.share, data)
