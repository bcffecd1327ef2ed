"""What a model name means at this moment: the base, or the version that a variant's name points at."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State

from deltaserve.delta_store.errors import (
    ArtifactError,
    CorruptArtifact,
    GenerationFailed,
    InvalidName,
    VariantNotFound,
)
from deltaserve.delta_store.registry import Registered
from deltaserve.server.api.tokenisers import Tokeniser
from deltaserve.server.engine.requests import Version


@dataclass(frozen=True, slots=True)
class Served:
    """A name with its version (None: the base) and tokeniser; ``held`` keeps the version's file there until closed."""

    name: str
    version: Version | None
    digest: str
    tokeniser: Tokeniser
    held: ExitStack

    @property
    def headers(self) -> dict[str, str]:
        """Names exactly what answered: the version's digest, or the base's fingerprint."""
        return {"x-deltaserve-version": self.digest}


async def resolve(state: State, name: str, key: str | None = None) -> Served:
    """What ``name`` means now, for the user ``key``. Whoever calls closes ``held`` when the answer has ended.

    Raises VariantNotFound, GenerationFailed (the version's file is damaged), RegistryUnavailable.
    """
    if name == state.settings.base_name:
        return Served(name, None, state.engine.fingerprint, state.tokenisers.base, ExitStack())
    try:
        return await run_in_threadpool(_find, state, name, key)
    except ArtifactError as error:
        raise GenerationFailed(f"The model {name!r} cannot be loaded: {error}") from error


def current(state: State, name: str, key: str | None = None) -> Registered:
    """The version that a variant's name points at; of a split, the one for the user ``key`` (None: drawn at random).

    Raises VariantNotFound if there is none, or one of another base.
    """
    try:
        registered: Registered = state.registry.pointer(name).choose(key)
    except (VariantNotFound, InvalidName) as error:
        raise VariantNotFound(f"The model {name!r} does not exist; GET /v1/models lists those that do") from error
    if registered.receipt.base != state.engine.fingerprint:
        raise VariantNotFound(f"The variant {name!r} was made for another base than the one served here")
    return registered


def usable(state: State, registered: Registered) -> bool:
    """Whether a version can be served here: made for this base, and its file is there."""
    return registered.receipt.base == state.engine.fingerprint and state.blobs.has(registered.digest)


def _find(state: State, name: str, key: str | None) -> Served:
    with ExitStack() as holding:
        registered, path = _held(state, name, key, holding)
        tokeniser = state.tokenisers.of(registered.digest, path)
        version = Version(name, registered.digest, str(path))
        return Served(name, version, registered.digest, tokeniser, holding.pop_all())


def _held(state: State, name: str, key: str | None, holding: ExitStack) -> tuple[Registered, Path]:
    """The current version with its file held; if that was removed in between, the name is looked up once more."""
    registered = current(state, name, key)
    try:
        return registered, holding.enter_context(state.blobs.hold(registered.digest))
    except CorruptArtifact:
        registered = current(state, name, key)
        return registered, holding.enter_context(state.blobs.hold(registered.digest))
