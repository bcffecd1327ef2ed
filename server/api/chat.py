"""``POST /v1/chat/completions``."""

from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltaserve.server.api.admission import Answer
from deltaserve.server.api.bounded import BoundedRoute
from deltaserve.server.api.chat_parts import Parts, reader
from deltaserve.server.api.choice import Piece
from deltaserve.server.api.documented import EVENTS
from deltaserve.server.api.generating import generate
from deltaserve.server.api.logprobs import chat_logprobs
from deltaserve.server.api.responses import (
    ERRORS,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatFinishReason,
    ChatLogprobs,
    head,
)
from deltaserve.server.api.schemas import ChatRequest, Message
from deltaserve.server.api.tokenisers import Tokeniser

router = APIRouter(tags=["OpenAI"], route_class=BoundedRoute, responses=ERRORS)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=EVENTS)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    return await generate(request, body, prompts, _whole, _chunks)


def prompts(body: ChatRequest, tokeniser: Tokeniser) -> list[list[int]]:
    """The conversation as the template writes it."""
    tools = [tool.model_dump(exclude_unset=True) for tool in body.callable_tools]
    return [tokeniser.conversation([as_turn(message) for message in body.messages], tools)]


def as_turn(message: Message) -> dict[str, Any]:
    """A message as chat templates read it; they know ``developer`` by its older name, ``system``."""
    turn: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "tool_calls": [call.as_turn for call in message.tool_calls],
    }
    return {key: value for key, value in turn.items() if value or key == "content"}


async def _whole(body: ChatRequest, answer: Answer) -> ChatCompletion:
    choices = [_choice(body, answer, index, pieces) for index, pieces in enumerate(await answer.by_choice())]
    first = head("chat.completion", "chatcmpl", answer.served.name, answer.served.digest)
    return ChatCompletion(**first, choices=choices, usage=answer.usage())


def _choice(body: ChatRequest, answer: Answer, index: int, pieces: list[Piece]) -> ChatChoice:
    parts = reader(body)
    events = [event for piece in pieces for event in parts.read(piece)]
    return ChatChoice(
        index=index,
        message=parts.message(events),
        logprobs=_logprobs(body, answer, pieces),
        finish_reason=parts.reason(answer.choices[index].finish_reason),
    )


async def _chunks(body: ChatRequest, answer: Answer) -> AsyncGenerator[ChatChunk]:
    """For each choice: its role, its text and tool calls, its finish reason; then the token counts if asked for."""
    first = head("chat.completion.chunk", "chatcmpl", answer.served.name, answer.served.digest)
    if body.include_usage:
        first["usage"] = None
    begun: defaultdict[int, Parts] = defaultdict(lambda: reader(body))
    async with aclosing(answer.pieces()) as pieces:
        async for index, piece in pieces:
            if index not in begun:
                yield ChatChunk(**first, choices=[_delta(index, ChatDelta(role="assistant", content=""))])
            parts = begun[index]
            deltas = [parts.delta(event) for event in parts.read(piece)]
            logprobs = _logprobs(body, answer, [piece]) if piece.tokens else None
            if logprobs and not deltas:
                deltas = [ChatDelta(content="")]
            for delta in deltas:
                yield ChatChunk(**first, choices=[_delta(index, delta, logprobs)])
                logprobs = None
            if piece.finish_reason:
                reason = parts.reason(piece.finish_reason)
                yield ChatChunk(**first, choices=[_delta(index, ChatDelta(), None, reason)])
    if body.include_usage:
        yield ChatChunk(**first | {"usage": answer.usage()}, choices=[])


def _delta(
    index: int, delta: ChatDelta, logprobs: ChatLogprobs | None = None, reason: ChatFinishReason | None = None
) -> ChatChunkChoice:
    return ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)


def _logprobs(body: ChatRequest, answer: Answer, pieces: list[Piece]) -> ChatLogprobs | None:
    return chat_logprobs(pieces, answer.served.tokeniser.token_bytes) if body.logprobs else None
