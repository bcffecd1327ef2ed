"""One answer's stream of server-sent events, read as OpenAI's chat and completion endpoints write it."""

from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel, ValidationError

DONE = b"[DONE]"


class StreamError(Exception):
    """The server refused, ended the stream with an error, or sent something that is no event of OpenAI's."""


class Delta(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class Choice(BaseModel):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def has_text(self) -> bool:
        """A role-only event brings no token; a reasoning model's thoughts and tool calls are generated tokens too."""
        delta = self.delta or Delta()
        return bool(self.text or delta.content or delta.reasoning_content or delta.tool_calls)


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int


class Event(BaseModel):
    """What the benchmark reads of one event; whatever else a server writes is its own business."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None

    @property
    def has_text(self) -> bool:
        return any(choice.has_text for choice in self.choices)

    @property
    def finished(self) -> bool:
        return any(choice.finish_reason for choice in self.choices)


async def payloads(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The ``data:`` payloads of a byte stream; comments and other fields are skipped.

    Lines are split as bytes: splitting text would also break at the U+2028 that a JSON string may hold.
    """
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def parse(payload: bytes) -> Event:
    """One payload other than ``[DONE]``. Raises ``StreamError`` for an error event and for what is no event at all."""
    try:
        event = Event.model_validate_json(payload)
    except ValidationError as error:
        raise StreamError(f"not an event of OpenAI's: {payload[:80].decode(errors='replace')}") from error
    if event.error:
        raise StreamError(f"error event: {error_message(event.error)}")
    return event


def error_message(error: Any) -> str:
    """The message inside an OpenAI error, or whatever stands there instead; at most 200 characters."""
    while isinstance(error, dict) and (inner := error.get("error") or error.get("message")):
        error = inner
    return str(error)[:200]
