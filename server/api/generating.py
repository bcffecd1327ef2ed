"""What both generating routes do between a checked body and their response, and how long they hold on to things."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State

from deltaserve.server.api.admission import Answer, admit
from deltaserve.server.api.kinds import check_generates
from deltaserve.server.api.schemas import ChatRequest, CompletionRequest
from deltaserve.server.api.served import resolve
from deltaserve.server.api.streaming import EventStream, while_connected
from deltaserve.server.api.tokenisers import Tokeniser

CLIENT_LEFT = 499

Asked = TypeVar("Asked", bound=ChatRequest | CompletionRequest)
Prompts = Callable[[Asked, Tokeniser], list[list[int]]]
Whole = Callable[[Asked, Answer], Awaitable[BaseModel]]
Chunks = Callable[[Asked, Answer], AsyncGenerator[BaseModel]]


async def generate(
    request: Request, body: Asked, prompts: Prompts[Asked], whole: Whole[Asked], chunks: Chunks[Asked]
) -> Response:
    """The response to ``body``; what differs between the routes is how ``prompts`` and answers are written.

    ``prompts`` runs off the event loop. A client that leaves cancels the work.
    """
    generating = _generate(request, body, prompts, whole, chunks)
    return await while_connected(request.receive, generating) or Response(status_code=CLIENT_LEFT)


async def _generate(
    request: Request, body: Asked, prompts: Prompts[Asked], whole: Whole[Asked], chunks: Chunks[Asked]
) -> Response:
    """The version is held and its requests run until the answer is over: a stream's end comes after this function's."""
    state: State = request.app.state
    check_generates(state)
    state.visits.check(request, body.model)
    served = await resolve(state, body.model, body.user)
    with served.held as holding:
        ids = await run_in_threadpool(prompts, body, served.tokeniser)
        grammar = await run_in_threadpool(body.grammar, served.tokeniser.grammars)
        visit = await state.visits.enter(request, served.name, sum(map(len, ids)), body.token_limit)
        holding.push(visit)
        most = state.settings.default_max_tokens
        answer = visit.answer = await admit(state.engine, served, ids, body, most, grammar)
        headers = served.headers | visit.headers
        holding.callback(answer.cancel)
        if not body.stream:
            content = (await whole(body, answer)).model_dump_json()
            return Response(content, media_type="application/json", headers=headers)
        release = holding.pop_all().close
    return await EventStream.started(chunks(body, answer), release, headers)
