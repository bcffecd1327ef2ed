"""``GET /v1/models``: every name that a request's ``model`` may be."""

import time

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State

from deltaserve.delta_store.errors import VariantNotFound
from deltaserve.delta_store.registry import Registered
from deltaserve.server.api.responses import ERRORS, Model, ModelList
from deltaserve.server.api.served import current, usable

router = APIRouter(tags=["OpenAI"], responses=ERRORS)
STARTED = int(time.time())


@router.get("/v1/models", response_model=ModelList)
async def list_models(request: Request) -> ModelList:
    """The base, then the variants that can be asked now, by name: those that the key may use."""
    state, key = request.app.state, request.state.key
    models = [base_model(state), *await run_in_threadpool(_variants, state)]
    return ModelList(data=[model for model in models if key is None or key.may_use(model.id)])


@router.get("/v1/models/{name:path}", response_model=Model)
async def retrieve_model(name: str, request: Request) -> Model:
    """One of them."""
    state = request.app.state
    state.visits.check(request, name)
    return base_model(state) if name == state.settings.base_name else await run_in_threadpool(_variant, state, name)


def base_model(state: State) -> Model:
    """The base; ``created`` is when this server started, ``version`` the base's fingerprint."""
    name = state.settings.base_name
    return Model(id=name, created=STARTED, root=name, parent=None, version=state.engine.fingerprint)


def _model(state: State, registered: Registered) -> Model:
    base = state.settings.base_name
    return Model(
        id=registered.variant, created=int(registered.created), root=base, parent=base, version=registered.digest
    )


def _variants(state: State) -> list[Model]:
    return [_model(state, registered) for registered in state.registry.variants() if usable(state, registered)]


def _variant(state: State, name: str) -> Model:
    registered = current(state, name)
    if not usable(state, registered):
        raise VariantNotFound(f"The file of variant {name!r} is missing from the store; upload it again")
    return _model(state, registered)
