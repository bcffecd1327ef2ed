"""An OpenAI server with known timing: real HTTP on loopback, and its own record of when it sent what."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

# Timing of the case: first token after 200 ms, then one every 20 ms, 11 tokens.
FIRST_S, EVERY_S, TOKENS = 0.200, 0.020, 11


@dataclass
class Script:
    """How one model answers. ``tokens_per_event`` starts with the second event: the first one has one token."""

    role_event: bool = False
    tokens_per_event: int = 1
    text: str = "word "
    usage: bool = True
    tokens: int = TOKENS
    fail_every: int = 0  # every so many requests, as ``failure`` says
    failure: str = "500"  # 500 | error event | empty | endless | cut
    first_s: float = FIRST_S
    every_s: float = EVERY_S


@dataclass
class Sent:
    """When a request arrived and when its events with text were sent, on this process's monotonic clock."""

    model: str
    arrived: float
    texts: list[float] = field(default_factory=list)
    ended: float | None = None


@dataclass
class FakeServer:
    url: str = ""
    scripts: dict[str, Script] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    late_s: list[float] = field(default_factory=list)

    @property
    def lag_s(self) -> float:
        """How late this process was woken while the server ran, in 19 of 20 cases: what the machine's load adds."""
        return quantiles(self.late_s, n=20)[-1]

    def watch_lag(self, stop: threading.Event) -> None:
        while True:
            due = time.perf_counter() + 0.005
            if stop.wait(0.005):
                return
            self.late_s.append(time.perf_counter() - due)

    def fails(self, model: str) -> bool:
        """Whether the request that arrived last is one of those that fail."""
        script = self.scripts[model]
        count = sum(sent.model == model for sent in self.sent)
        return bool(script.fail_every) and count % script.fail_every == 0


def _event(chat: bool, text: str | None, finish_reason: str | None = None) -> str:
    brought = {"delta": {} if text is None else {"content": text}} if chat else {"text": text or ""}
    return _data({"choices": [{"index": 0, **brought, "finish_reason": finish_reason}]})


def _data(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _answer(script: Script, sent: Sent, chat: bool, fails: bool) -> AsyncIterator[str]:
    """The stream of one answer. Waits until points in time, so that a late wake-up does not add up."""
    if script.role_event and chat:
        yield _data({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
    yield ": a comment, as keep-alives are\n\n"
    done, tokens = 0, 0 if fails and script.failure == "empty" else script.tokens
    while done < tokens:
        # The token that an event waits for is its last one.
        step = min(script.tokens_per_event if done else 1, tokens - done)
        await _until(sent.arrived + script.first_s + (done + step - 1) * script.every_s)
        if fails and done == 3:
            if script.failure == "error event":
                yield _data({"error": {"message": "the generation thread died", "type": "server_error"}})
            elif script.failure == "endless":
                await asyncio.sleep(3600)
            return
        sent.texts.append(time.perf_counter())
        yield _event(chat, script.text * step)
        done += step
    sent.ended = time.perf_counter()
    yield _event(chat, None, "stop")
    if script.usage:
        yield _data({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": done, "total_tokens": 5 + done}})
    yield "data: [DONE]\n\n"


async def _until(moment: float) -> None:
    """Not a moment earlier, as ``asyncio.sleep`` alone may be."""
    while (wait := moment - time.perf_counter()) > 0:
        await asyncio.sleep(wait)


def application(server: FakeServer) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in server.scripts]}

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    async def answer(request: Request) -> Response:
        sent = Sent("", time.perf_counter())
        body = await request.json()
        sent.model = body["model"]
        server.sent.append(sent)
        server.bodies.append(body)
        server.headers.append(dict(request.headers))
        script, fails = server.scripts[sent.model], server.fails(sent.model)
        if fails and script.failure == "500":
            return JSONResponse({"error": {"message": "out of memory", "type": "server_error"}}, status_code=500)
        chat = request.url.path.endswith("chat/completions")
        return StreamingResponse(counted(_answer(script, sent, chat, fails)), media_type="text/event-stream")

    async def counted(stream: AsyncIterator[str]) -> AsyncIterator[str]:
        server.under_way += 1
        server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            async for event in stream:
                yield event
        finally:
            server.under_way -= 1

    return app


@contextmanager
def fake_server(**scripts: Script) -> Iterator[FakeServer]:
    """Serves ``scripts``, one a model (an underscore in its name stands for a hyphen), on a free port."""
    fake = FakeServer(scripts={name.replace("_", "-"): script for name, script in scripts.items()})
    config = uvicorn.Config(application(fake), port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    stop = threading.Event()
    watch = threading.Thread(target=fake.watch_lag, args=(stop,))
    watch.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the fake server did not start")
            time.sleep(0.01)
        fake.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield fake
    finally:
        stop.set()
        server.should_exit = True
        thread.join()
        watch.join()
