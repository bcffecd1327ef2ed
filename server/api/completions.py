"""``POST /v1/completions``: the older route, for texts and token ids without a chat template."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State

from deltaserve.server.api.admission import Answer, admit
from deltaserve.server.api.bounded import BoundedRoute
from deltaserve.server.api.choice import Piece
from deltaserve.server.api.logprobs import completion_logprobs
from deltaserve.server.api.responses import (
    ERRORS,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    head,
)
from deltaserve.server.api.schemas import CompletionRequest
from deltaserve.server.api.served import resolve
from deltaserve.server.api.streaming import EventStream, answered
from deltaserve.server.api.tokenisers import Tokeniser

router = APIRouter(tags=["OpenAI"], route_class=BoundedRoute)


@router.post("/v1/completions", response_model=Completion, responses=ERRORS)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one or several prompts."""
    return await answered(request.receive, _answer(body, request.app.state))


async def _answer(body: CompletionRequest, state: State) -> Response:
    served = await resolve(state, body.model)
    with served.held as holding:
        prompts = await run_in_threadpool(lambda: [token_ids(served.tokeniser, prompt) for prompt in body.prompt])
        answer = await admit(state.engine, served, prompts, body, body.token_limit, body.logprobs, continues=True)
        holding.callback(answer.cancel)
        echoes = echoed(body, served.tokeniser)
        if not body.stream:
            return await _whole(body, answer, echoes)
        release = holding.pop_all().close
    return await EventStream.started(_chunks(body, answer, echoes), release, served.headers)


def token_ids(tokeniser: Tokeniser, prompt: str | list[int]) -> list[int]:
    """A text with what its tokenizer puts around it, or token ids as they are."""
    return tokeniser.ids(prompt) if isinstance(prompt, str) else prompt


def echoed(body: CompletionRequest, tokeniser: Tokeniser) -> list[str]:
    """For each choice, what comes before its text: its prompt as text, if ``echo`` asks for it."""
    if not body.echo:
        return [""] * (body.n * len(body.prompt))
    texts = [prompt if isinstance(prompt, str) else tokeniser.text(prompt) for prompt in body.prompt]
    return [text for text in texts for _ in range(body.n)]


async def _whole(body: CompletionRequest, answer: Answer, echoes: list[str]) -> Response:
    served = answer.served
    choices = [
        _choice(body, answer, index, pieces, echoes[index], answer.choices[index].finish_reason)
        for index, pieces in enumerate(await answer.by_choice())
    ]
    whole = Completion(
        **head("text_completion", "cmpl", served.name, served.digest), choices=choices, usage=answer.usage()
    )
    return Response(whole.model_dump_json(), media_type="application/json", headers=served.headers)


async def _chunks(body: CompletionRequest, answer: Answer, echoes: list[str]) -> AsyncGenerator[Completion]:
    """The pieces of each choice, the first one behind its echo; then the token counts if they were asked for."""
    first = head("text_completion", "cmpl", answer.served.name, answer.served.digest)
    if body.include_usage:
        first["usage"] = None
    echoes = list(echoes)
    async with aclosing(answer.pieces()) as pieces:
        async for index, piece in pieces:
            choice = _choice(body, answer, index, [piece], echoes[index], piece.finish_reason)
            echoes[index] = ""
            yield Completion(**first, choices=[choice])
    if body.include_usage:
        yield Completion(**first | {"usage": answer.usage()}, choices=[])


def _choice(
    body: CompletionRequest,
    answer: Answer,
    index: int,
    pieces: list[Piece],
    echo: str,
    reason: FinishReason | None,
) -> CompletionChoice:
    text = echo + "".join(piece.text for piece in pieces)
    return CompletionChoice(index=index, text=text, logprobs=_logprobs(body, answer, pieces), finish_reason=reason)


def _logprobs(body: CompletionRequest, answer: Answer, pieces: list[Piece]) -> CompletionLogprobs | None:
    return None if body.logprobs is None else completion_logprobs(pieces, answer.served.tokeniser.token_bytes)
