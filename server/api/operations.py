"""Is the server alive, and would a request be answered."""

from fastapi import APIRouter, Request

from deltaserve.delta_store.errors import EngineDown
from deltaserve.server.api.responses import ERRORS

router = APIRouter(tags=["operations"], responses=ERRORS)


@router.get("/health")
async def health() -> dict[str, str]:
    """200 as long as the process answers HTTP at all."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """200 while the generation thread runs; else 503, and the message says why not."""
    engine = request.app.state.engine
    if not engine.ready():
        raise EngineDown(f"The server is not ready: {engine.failure or 'the engine has not started'}")
    return {"status": "ready"}
