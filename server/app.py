"""The application: what lives as long as the server does, and which routes it has."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import TYPE_CHECKING

from anyio import CapacityLimiter
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from deltaserve.delta_store.blobs import BlobStore, open_blobs
from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.registry.open import open_registry
from deltaserve.server import operating
from deltaserve.server.api import (
    chat,
    classify,
    completions,
    embeddings,
    errors,
    file_uploads,
    files,
    jobs,
    keys,
    lora_adapters,
    models,
    new_variant,
    openai_responses,
    operations,
    profiles,
    residency,
    usage,
    variants,
    versions,
)
from deltaserve.server.api.tokenisers import Tokenisers
from deltaserve.server.console import figures, page
from deltaserve.server.files.store import FileStore
from deltaserve.server.files.uploads import Uploads
from deltaserve.server.jobs.runner import Runner, WorkerLimits
from deltaserve.server.jobs.store import JobStore
from deltaserve.server.settings import Settings
from deltaserve.server.version import installed_version

if TYPE_CHECKING:
    from deltaserve.server.engine.encoder import EncoderEngine
    from deltaserve.server.engine.engine import Engine


ROUTES = (
    chat,
    completions,
    openai_responses,
    embeddings,
    classify,
    models,
    operations,
    keys,
    usage,
    files,
    file_uploads,
    profiles,
    residency,
    versions,
    new_variant,
    variants,
    lora_adapters,
    jobs,
    figures,
)
"""The modules with routes; of two that fit an address the first one answers."""


def create_app(settings: Settings, engine: "Engine | EncoderEngine | None" = None) -> FastAPI:
    """The server as an ASGI application; ``engine`` None loads one as the settings say.

    ``app.state`` has ``settings``, ``engine`` (started while the application runs), ``registry``, ``blobs``
    (artifacts), ``profiles`` (activation profiles, a BlobStore from which nothing is removed), ``files``, ``uploads``
    (parts of files that are on their way), ``jobs`` and their ``runner``, ``tokenisers`` and
    ``examinations``, which lets one upload at a time have the processor; operating.py adds more. Raises the
    DeltaServeError that stands in the way of serving.
    """
    app = FastAPI(title="deltaserve", version=installed_version(), lifespan=_lifespan)
    app.state.settings = settings
    operating.install(app, settings)
    app.state.blobs = open_blobs(settings.folder / "blobs", settings.blobs, "blobs")
    app.state.profiles = open_blobs(settings.folder / "profiles", settings.blobs, "profiles")
    app.state.files = FileStore(settings.folder / "files", settings.folder / "files.sqlite3")
    app.state.uploads = Uploads(app.state.files, settings.upload_seconds)
    app.state.jobs = JobStore(settings.folder / "jobs", settings.folder / "jobs.sqlite3")
    app.state.registry = open_registry(
        settings.registry, settings.folder / "registry.sqlite3", settings.registry_prefix
    )
    for store in (app.state.blobs, app.state.profiles):
        store.check()
    app.state.blobs.sweep(app.state.registry.digests)
    app.state.engine = engine or load_engine(settings, app.state.profiles)
    app.state.tokenisers = Tokenisers(app.state.engine.tokenizer)
    app.state.runner = runner_of(app)
    app.state.engine.watch(app.state.metrics)
    errors.install(app)
    for module in ROUTES:
        app.include_router(module.router)
    page.install(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.examinations = CapacityLimiter(1)
    app.state.engine.start()
    try:
        for name in app.state.settings.pin:
            await residency.keep(app.state, name)
        app.state.runner.start()
        yield
    finally:
        await run_in_threadpool(app.state.runner.stop)
        await run_in_threadpool(app.state.engine.stop)
        await run_in_threadpool(operating.close, app)
        app.state.registry.close()
        app.state.files.close()
        app.state.jobs.close()


def runner_of(app: FastAPI) -> Runner:
    """What runs compression jobs for this application."""
    settings, state = app.state.settings, app.state
    return Runner(
        state.jobs,
        lambda job, made: new_variant.register_made(job, made, state),
        base=settings.base,
        profile=settings.folder / "jobs" / f"profile-{state.engine.fingerprint}.safetensors",
        at_once=settings.max_jobs,
        limits=WorkerLimits(settings.job_memory_bytes, settings.job_threads, settings.job_nice),
    )


def load_engine(settings: Settings, profiles: BlobStore) -> "Engine | EncoderEngine":
    """The engine for this kind of base, with the base loaded, not started."""
    from deltaserve.server.engine.engine import Engine
    from deltaserve.server.engine.limits import EngineLimits

    limits = EngineLimits(**{field.name: getattr(settings, field.name) for field in fields(EngineLimits)})
    if open_checkpoint(settings.base).architecture.is_encoder:
        from deltaserve.server.engine.encoder import EncoderEngine

        return EncoderEngine(settings.base, limits=limits, profile_path=profiles.fetched)
    return Engine(settings.base, limits=limits, profile_path=profiles.fetched)
