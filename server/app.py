"""The application: what lives as long as the server does, and which routes it has."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import TYPE_CHECKING

from anyio import CapacityLimiter
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from deltaserve.delta_store.blobs import BlobStore
from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.registry.sqlite import SqliteRegistry
from deltaserve.server.api import (
    chat,
    classify,
    completions,
    embeddings,
    errors,
    models,
    operations,
    profiles,
    variants,
)
from deltaserve.server.api.tokenisers import Tokenisers
from deltaserve.server.settings import Settings
from deltaserve.server.version import installed_version

if TYPE_CHECKING:
    from deltaserve.server.engine.encoder import EncoderEngine
    from deltaserve.server.engine.engine import Engine


def create_app(settings: Settings, engine: "Engine | EncoderEngine | None" = None) -> FastAPI:
    """The server as an ASGI application; ``engine`` None loads one as the settings say.

    ``app.state`` has ``settings``, ``engine`` (started while the application runs), ``registry``, ``blobs``
    (artifacts), ``profiles`` (activation profiles, a BlobStore from which nothing is removed), ``tokenisers`` and
    ``examinations``, which lets one upload at a time have the processor. Raises the DeltaServeError that stands in the
    way of serving.
    """
    app = FastAPI(title="deltaserve", version=installed_version(), lifespan=_lifespan)
    app.state.settings = settings
    app.state.blobs = BlobStore(settings.folder / "blobs")
    app.state.profiles = BlobStore(settings.folder / "profiles")
    app.state.registry = SqliteRegistry(settings.folder / "registry.sqlite3")
    app.state.blobs.sweep(app.state.registry.digests)
    app.state.engine = engine or load_engine(settings, app.state.profiles)
    app.state.tokenisers = Tokenisers(app.state.engine.tokenizer)
    errors.install(app)
    for module in (chat, completions, embeddings, classify, models, operations, profiles, variants):
        app.include_router(module.router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.examinations = CapacityLimiter(1)
    app.state.engine.start()
    try:
        yield
    finally:
        await run_in_threadpool(app.state.engine.stop)
        app.state.registry.close()


def load_engine(settings: Settings, profiles: BlobStore) -> "Engine | EncoderEngine":
    """The engine for this kind of base, with the base loaded, not started."""
    from deltaserve.server.engine.engine import Engine, EngineLimits

    limits = EngineLimits(**{field.name: getattr(settings, field.name) for field in fields(EngineLimits)})
    if open_checkpoint(settings.base).architecture.is_encoder:
        from deltaserve.server.engine.encoder import EncoderEngine

        return EncoderEngine(settings.base, limits=limits, profile_path=profiles.path)
    return Engine(settings.base, limits=limits, profile_path=profiles.path)
