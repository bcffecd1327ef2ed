"""``POST /v1/completions``: the older route, for texts and token ids without a chat template."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltaserve.server.api.admission import Answer
from deltaserve.server.api.bounded import BoundedRoute
from deltaserve.server.api.choice import Piece
from deltaserve.server.api.documented import EVENTS
from deltaserve.server.api.generating import generate
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
from deltaserve.server.api.tokenisers import Tokeniser

router = APIRouter(tags=["OpenAI"], route_class=BoundedRoute, responses=ERRORS)


@router.post("/v1/completions", response_model=Completion, responses=EVENTS)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one or several prompts."""
    return await generate(request, body, _prompts, _whole, _chunks)


def _prompts(body: CompletionRequest, tokeniser: Tokeniser) -> list[list[int]]:
    """Texts with what their tokenizer puts around them, token ids as they are."""
    return [tokeniser.ids(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompt]


def echoed(body: CompletionRequest, tokeniser: Tokeniser) -> list[str]:
    """For each choice, what comes before its text: its prompt as text, if ``echo`` asks for it."""
    if not body.echo:
        return [""] * (body.n * len(body.prompt))
    texts = [prompt if isinstance(prompt, str) else tokeniser.text(prompt) for prompt in body.prompt]
    return [text for text in texts for _ in range(body.n)]


async def _whole(body: CompletionRequest, answer: Answer) -> Completion:
    echoes = echoed(body, answer.served.tokeniser)
    choices = [
        _choice(body, answer, index, pieces, echoes[index], answer.choices[index].finish_reason)
        for index, pieces in enumerate(await answer.by_choice())
    ]
    first = head("text_completion", "cmpl", answer.served.name, answer.served.digest)
    return Completion(**first, choices=choices, usage=answer.usage())


async def _chunks(body: CompletionRequest, answer: Answer) -> AsyncGenerator[Completion]:
    """The pieces of each choice, the first one behind its echo; then the token counts if they were asked for."""
    first = head("text_completion", "cmpl", answer.served.name, answer.served.digest)
    if body.include_usage:
        first["usage"] = None
    echoes = echoed(body, answer.served.tokeniser)
    async with aclosing(answer.pieces()) as pieces:
        async for index, piece in pieces:
            yield Completion(
                **first, choices=[_choice(body, answer, index, [piece], echoes[index], piece.finish_reason)]
            )
            echoes[index] = ""
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
