"""One request to an OpenAI server, from sending it to the end of its stream, as one record."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any, Literal

import httpx

from deltaserve.server.bench.events import DONE, StreamError, Usage, error_message, parse, payloads

Endpoint = Literal["chat", "completions"]
PATHS: dict[Endpoint, str] = {"chat": "/chat/completions", "completions": "/completions"}


class Outcome(StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"
    EMPTY = "empty"
    TIMED_OUT = "timed out"


@dataclass(frozen=True, slots=True)
class Asking:
    """What is the same for all requests of a run."""

    endpoint: Endpoint = "chat"
    max_tokens: int = 64
    temperature: float = 0.0
    ignore_eos: bool = False
    timeout_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Ask:
    """What one request asks of whom."""

    model: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Record:
    """What one request came to. Times are seconds of this process's monotonic clock.

    ``start`` is when it was due: in an open loop that may be before it could be sent, and the wait is the server's
    fault. ``texts`` are the arrivals of the events that brought text. ``tokens`` is the server's ``usage`` or, if
    ``estimated``, the number of those events. ``reason`` says why a request was not completed.
    """

    model: str
    outcome: Outcome
    start: float
    end: float
    texts: tuple[float, ...] = ()
    tokens: int = 0
    estimated: bool = False
    reason: str = ""

    @property
    def ttft(self) -> float:
        """Time to the first text."""
        return self.texts[0] - self.start

    @property
    def e2e(self) -> float:
        """Time to the end of the answer."""
        return self.end - self.start

    @property
    def gaps(self) -> list[float]:
        """Times between events that brought text, each of which may hold several tokens; without the first wait."""
        return [later - earlier for earlier, later in pairwise(self.texts)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        return (self.e2e - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(slots=True)
class _Answer:
    """What has arrived of one answer so far."""

    texts: list[float]
    end: float | None = None
    usage: Usage | None = None


async def send(client: httpx.AsyncClient, asking: Asking, ask: Ask, due: float | None = None) -> Record:
    """Sends one streaming request and waits for its end. A failure is a record too, never an exception.

    ``due`` is when it should have been sent, now if not given; latencies count from there.
    """
    start = time.perf_counter() if due is None else due
    answer = _Answer(texts=[])
    outcome, reason = Outcome.FAILED, ""
    try:
        async with asyncio.timeout(asking.timeout_s):
            await _stream(client, asking, ask, answer)
        outcome, reason = _judge(answer)
    except TimeoutError:
        outcome, reason = Outcome.TIMED_OUT, f"no end of the answer within {asking.timeout_s:g} s"
    except StreamError as error:
        reason = str(error)
    except httpx.HTTPError as error:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
    return Record(
        model=ask.model,
        outcome=outcome,
        start=start,
        end=answer.end if answer.end is not None else time.perf_counter(),
        texts=tuple(answer.texts),
        tokens=answer.usage.completion_tokens if answer.usage else len(answer.texts),
        estimated=answer.usage is None,
        reason=reason,
    )


def body(asking: Asking, ask: Ask) -> dict[str, Any]:
    """The request's JSON. Only ``ignore_eos`` is no field of OpenAI's, and only sent where it was asked for."""
    messages = [{"role": "user", "content": ask.prompt}]
    return {
        "model": ask.model,
        **({"messages": messages} if asking.endpoint == "chat" else {"prompt": ask.prompt}),
        "max_tokens": asking.max_tokens,
        "temperature": asking.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if asking.ignore_eos else {}),
    }


async def _stream(client: httpx.AsyncClient, asking: Asking, ask: Ask, answer: _Answer) -> None:
    async with client.stream("POST", PATHS[asking.endpoint], json=body(asking, ask)) as response:
        if response.status_code != httpx.codes.OK:
            raise StreamError(await _refusal(response))
        finished = await _read(payloads(response.aiter_bytes()), answer)
    if not finished:
        raise StreamError("the stream broke off without [DONE] or a finish_reason")


async def _read(stream: AsyncIterator[bytes], answer: _Answer) -> bool:
    """Notes what arrives, and when; whether the answer came to its end."""
    finished = False
    async for payload in stream:
        now = time.perf_counter()
        if payload == DONE:
            finished = True
            continue  # reads on, so that the connection can serve the next request
        answer.end = now
        event = parse(payload)
        if event.has_text:
            answer.texts.append(now)
        finished = finished or event.finished
        answer.usage = event.usage or answer.usage
    return finished


def _judge(answer: _Answer) -> tuple[Outcome, str]:
    """An answer without text is neither fast nor slow: it has no first token to time."""
    if answer.texts:
        return Outcome.COMPLETED, ""
    return Outcome.EMPTY, f"no text, {answer.usage.completion_tokens} tokens by usage" if answer.usage else "no text"


async def _refusal(response: httpx.Response) -> str:
    content = await response.aread()
    try:
        message = error_message(json.loads(content))
    except ValueError:
        message = content[:200].decode(errors="replace")
    return f"HTTP {response.status_code}: {message}"
