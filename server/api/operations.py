"""Is the server alive, would a request be answered, and what has it done: for those who run it."""

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State

from deltaserve.delta_store.errors import EngineDown, RegistryUnavailable, ShuttingDown
from deltaserve.server.api.responses import ERRORS

router = APIRouter(tags=["operations"], responses=ERRORS)


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """200 while a restart would not help: also while the base is busy, restarting after a failure, or shutting down."""
    if (lost := getattr(request.app.state.engine, "lost", None)) is not None:
        raise EngineDown(f"The server needs a restart: {lost}")
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """200 while a request would be answered; else 503, and the message says why not.

    ``registry`` is ``ok``, or says why it is down: what was served before still is, so the answer stays 200.
    """
    state = request.app.state
    if state.draining.begun:
        raise ShuttingDown(f"The server is shutting down; {state.draining.running} requests still run")
    if not state.engine.ready():
        raise EngineDown(f"The server is not ready: {state.engine.failure or 'the engine has not started'}")
    return {"status": "ready", "registry": await run_in_threadpool(_state_of_registry, state)}


def _state_of_registry(state: State) -> str:
    try:
        state.registry.check()
    except RegistryUnavailable as error:
        return f"down: {error}"
    return "ok"


@router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
def metrics(request: Request) -> Response:
    """What happened and what there is, for Prometheus, in its text format or OpenMetrics as the client prefers."""
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(request.app.state.metrics.registry), headers={"content-type": media_type})
