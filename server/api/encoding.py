"""What embeddings and classes have in common: texts in, one result for each, and how long the version is held."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State

from deltaserve.delta_store.errors import ArtifactError, GenerationFailed
from deltaserve.server.api.fields import Body, Inputs, Text
from deltaserve.server.api.kinds import check_encodes
from deltaserve.server.api.served import Served, resolve
from deltaserve.server.api.streaming import while_connected
from deltaserve.server.api.tokenisers import Tokeniser

CLIENT_LEFT = 499


class EncodingRequest(Body):
    """The fields that both routes share."""

    model: Text
    input: Inputs
    user: Text | None = Field(None, description="One user gets one version of a split variant")


class EncodingUsage(BaseModel):
    """Token counts: nothing is generated."""

    prompt_tokens: int
    total_tokens: int


Ids = list[list[int]]
Asked = TypeVar("Asked", bound=EncodingRequest)
Outcome = TypeVar("Outcome")
Ask = Callable[[Asked, Any, Ids, Served], Awaitable[Outcome]]
Write = Callable[[Asked, Served, Ids, Outcome], BaseModel]


async def encode(request: Request, body: Asked, ask: Ask[Asked, Outcome], write: Write[Asked, Outcome]) -> Response:
    """The response to ``body``: ``ask`` has the engine do it, ``write`` makes the answer of it, off the event loop.

    A client that leaves cancels the work.
    """
    encoding = _encode(request, body, ask, write)
    return await while_connected(request.receive, encoding) or Response(status_code=CLIENT_LEFT)


async def _encode(request: Request, body: Asked, ask: Ask[Asked, Outcome], write: Write[Asked, Outcome]) -> Response:
    state: State = request.app.state
    check_encodes(state)
    state.visits.check(request, body.model)
    served = await resolve(state, body.model, body.user)
    with served.held as holding:
        ids = await run_in_threadpool(_ids, body, served.tokeniser)
        visit = holding.enter_context(await state.visits.enter(request, served.name, sum(map(len, ids))))
        try:
            outcome = await ask(body, state.engine, ids, served)
        except ArtifactError as error:
            # Whoever uploaded it was told what was wrong with it; for whoever asks it, the server fails.
            raise GenerationFailed(f"The model {served.name!r} cannot be loaded: {error}") from error
        content = await run_in_threadpool(lambda: write(body, served, ids, outcome).model_dump_json())
        return Response(content, media_type="application/json", headers=served.headers | visit.headers)


def _ids(body: EncodingRequest, tokeniser: Tokeniser) -> Ids:
    """Texts with what their tokenizer puts around them, token ids as they are."""
    return [tokeniser.ids(text) if isinstance(text, str) else text for text in body.input]


def usage(ids: Ids) -> EncodingUsage:
    """Of all texts together."""
    count = sum(map(len, ids))
    return EncodingUsage(prompt_tokens=count, total_tokens=count)
