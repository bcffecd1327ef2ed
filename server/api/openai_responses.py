"""``POST /v1/responses`` in its small form: text in, text out. What it is beyond chat is refused by name."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from deltaserve.server.api.admission import Answer
from deltaserve.server.api.bounded import BoundedRoute
from deltaserve.server.api.chat import prompts
from deltaserve.server.api.documented import EVENTS
from deltaserve.server.api.fields import Between, Body, Text, only
from deltaserve.server.api.generating import generate
from deltaserve.server.api.responses import ERRORS
from deltaserve.server.api.schemas import ANY_COUNT, ChatRequest

router = APIRouter(tags=["OpenAI"], route_class=BoundedRoute, responses=ERRORS)
Object = dict[str, Any]


class InputText(Body):
    """A piece of a message; one of an earlier answer can be sent back as it came."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: Annotated[Any, only([])] = None
    logprobs: Annotated[Any, only([])] = None


def _parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


class InputMessage(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[InputText], BeforeValidator(_parts, json_schema_input_type=str | list[InputText])]
    type: Literal["message"] = "message"
    id: Text | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


def _messages(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


class ResponsesRequest(Body):
    """The body. Nothing is stored, so ``previous_response_id`` has nothing to name: send the turns in ``input``."""

    model: Text
    input: Annotated[
        list[InputMessage],
        Field(min_length=1),
        BeforeValidator(_messages, json_schema_input_type=str | list[InputMessage]),
    ]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Between(1, ANY_COUNT)] | None = None
    temperature: Annotated[float, Between(0, 2)] = 1.0
    top_p: Annotated[float, Between(0, 1, above=True)] = 1.0
    stream: bool = False
    user: Text | None = None

    previous_response_id: Annotated[Any, only()] = None
    store: Annotated[Any, only(False)] = None
    background: Annotated[Any, only(False)] = None
    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("auto", "none")] = None
    parallel_tool_calls: Annotated[Any, only(True, False)] = None
    text: Annotated[Any, only({"format": {"type": "text"}})] = None
    reasoning: Annotated[Any, only({})] = None
    truncation: Annotated[Any, only("disabled")] = None
    metadata: Annotated[Any, only({})] = None

    def as_chat(self) -> "_Chat":
        """The same question as a chat's; instructions come first."""
        turns = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        turns += [{"role": one.role, "content": "".join(part.text for part in one.content)} for one in self.input]
        return _Chat(
            model=self.model,
            messages=turns,  # type: ignore[arg-type]  # validated
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            user=self.user,
        )


class _Chat(ChatRequest):
    prompt_field: ClassVar[str] = "input"


class ResponseObject(BaseModel):
    """An answer, with more fields, as OpenAI has them; ``output`` is one message."""

    model_config = ConfigDict(extra="allow")
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class Event(BaseModel):
    """One event of a stream, with the fields that its type has."""

    model_config = ConfigDict(extra="allow")
    type: str
    sequence_number: int


@router.post("/v1/responses", response_model=ResponseObject, responses=EVENTS)
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Answer a text or a conversation."""

    async def whole(_: _Chat, answer: Answer) -> ResponseObject:
        (pieces,) = await answer.by_choice()
        return ResponseObject(**finished(begun(body), "".join(piece.text for piece in pieces), answer))

    return await generate(request, body.as_chat(), prompts, whole, lambda _, answer: events(body, answer))


def begun(body: ResponsesRequest) -> Object:
    """The response before its first word."""
    return {
        "id": f"resp_{uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "model": body.model,
        "output": [],
        **dict.fromkeys(("incomplete_details", "usage", "error", "previous_response_id")),
        **body.model_dump(include={"instructions", "max_output_tokens", "temperature", "top_p", "user"}),
        **{"store": False, "metadata": {}, "truncation": "disabled"},
        **{"tools": [], "tool_choice": "none", "parallel_tool_calls": False, "text": {"format": {"type": "text"}}},
    }


def message(response_id: str, status: str, *texts: str) -> Object:
    """The answer's only item."""
    item_id = response_id.replace("resp_", "msg_")
    return {"id": item_id, "type": "message", "role": "assistant", "status": status, "content": [*map(part, texts)]}


def part(text: str) -> Object:
    """Text of an answer."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def finished(response: Object, text: str, answer: Answer) -> Object:
    """The response with all of its text."""
    cut, used = answer.choices[0].finish_reason == "length", answer.usage()
    status = "incomplete" if cut else "completed"
    return response | {
        "status": status,
        "output": [message(response["id"], status, text)],
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "usage": {
            "input_tokens": used.prompt_tokens,
            "input_tokens_details": {"cached_tokens": used.prompt_tokens_details.cached_tokens},
            "output_tokens": used.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used.total_tokens,
        },
    }


async def events(body: ResponsesRequest, answer: Answer) -> AsyncGenerator[Event]:
    """OpenAI's events, the first ones once there is a token: what fails before is an ordinary HTTP status."""
    response, text, number = begun(body), "", 0
    item = message(response["id"], "in_progress")
    at = {"item_id": item["id"], "output_index": 0, "content_index": 0}

    def event(kind: str, **fields: Any) -> Event:
        nonlocal number
        number += 1
        return Event(type=f"response.{kind}", sequence_number=number - 1, **fields)

    async with aclosing(answer.pieces()) as pieces:
        async for _, piece in pieces:
            if number == 0:
                yield event("created", response=response)
                yield event("in_progress", response=response)
                yield event("output_item.added", output_index=0, item=item)
                yield event("content_part.added", part=part(""), **at)
            if piece.text:
                text += piece.text
                yield event("output_text.delta", delta=piece.text, logprobs=[], **at)
    response = finished(response, text, answer)
    yield event("output_text.done", text=text, logprobs=[], **at)
    yield event("content_part.done", part=part(text), **at)
    yield event("output_item.done", output_index=0, item=response["output"][0])
    yield event(response["status"], response=response)
