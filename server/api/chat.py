"""``POST /v1/chat/completions``."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltaserve.server.api.admission import Answer
from deltaserve.server.api.bounded import BoundedRoute
from deltaserve.server.api.choice import Piece
from deltaserve.server.api.generating import generate
from deltaserve.server.api.logprobs import chat_logprobs
from deltaserve.server.api.responses import (
    ERRORS,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FinishReason,
    head,
)
from deltaserve.server.api.schemas import ChatRequest, Message
from deltaserve.server.api.tokenisers import Tokeniser

router = APIRouter(tags=["OpenAI"], route_class=BoundedRoute, responses=ERRORS)


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    return await generate(request, body, _prompts, _whole, _chunks)


def _prompts(body: ChatRequest, tokeniser: Tokeniser) -> list[list[int]]:
    return [tokeniser.conversation([as_turn(message) for message in body.messages])]


def as_turn(message: Message) -> dict[str, str]:
    """A message as chat templates read it; they know ``developer`` by its older name, ``system``."""
    turn = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
    return turn if message.name is None else turn | {"name": message.name}


async def _whole(body: ChatRequest, answer: Answer) -> ChatCompletion:
    choices = [_choice(body, answer, index, pieces) for index, pieces in enumerate(await answer.by_choice())]
    first = head("chat.completion", "chatcmpl", answer.served.name, answer.served.digest)
    return ChatCompletion(**first, choices=choices, usage=answer.usage())


def _choice(body: ChatRequest, answer: Answer, index: int, pieces: list[Piece]) -> ChatChoice:
    text = "".join(piece.text for piece in pieces)
    return ChatChoice(
        index=index,
        message=ChatMessage(role="assistant", content=text),
        logprobs=_logprobs(body, answer, pieces),
        finish_reason=answer.choices[index].finish_reason,
    )


async def _chunks(body: ChatRequest, answer: Answer) -> AsyncGenerator[ChatChunk]:
    """For each choice: its role, its text, its finish reason; then the token counts if they were asked for."""
    first = head("chat.completion.chunk", "chatcmpl", answer.served.name, answer.served.digest)
    if body.include_usage:
        first["usage"] = None
    begun: set[int] = set()
    async with aclosing(answer.pieces()) as pieces:
        async for index, piece in pieces:
            if index not in begun:
                begun.add(index)
                yield ChatChunk(**first, choices=[_delta(index, ChatDelta(role="assistant", content=""))])
            logprobs = _logprobs(body, answer, [piece]) if piece.tokens else None
            if piece.text or logprobs:
                yield ChatChunk(**first, choices=[_delta(index, ChatDelta(content=piece.text), logprobs)])
            if piece.finish_reason:
                yield ChatChunk(**first, choices=[_delta(index, ChatDelta(), None, piece.finish_reason)])
    if body.include_usage:
        yield ChatChunk(**first | {"usage": answer.usage()}, choices=[])


def _delta(
    index: int, delta: ChatDelta, logprobs: ChatLogprobs | None = None, reason: FinishReason | None = None
) -> ChatChunkChoice:
    return ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)


def _logprobs(body: ChatRequest, answer: Answer, pieces: list[Piece]) -> ChatLogprobs | None:
    return chat_logprobs(pieces, answer.served.tokeniser.token_bytes) if body.logprobs else None
