"""Clients that go away or stop reading (case F-client-gone). A token takes 50 ms; answers would last for minutes."""

import asyncio
import gc
import logging
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_engine import Script, ScriptedEngine
from scripted_service import serving

from deltaserve.server.api import streaming

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100_000}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Any]:
    engine = ScriptedEngine(context_length=200_000, max_running=1)
    engine.script = lambda *_: Script([50], endless=True, every_s=0.05)
    with serving(tmp_path, engine) as running:
        yield running


def read_and_leave(service: Any, events: int = 3) -> None:
    with service.http() as http, http.stream("POST", CHAT, json=ASK | {"stream": True}) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data:"))
        for _ in range(events):
            next(lines)


def wait_and_leave(service: Any, seconds: float = 0.5) -> None:
    with service.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post(CHAT, json=ASK, timeout=seconds)


def stands_still(service: Any) -> bool:
    """Whether every request was cancelled, and counted as that, and nothing more is produced."""
    service.wait_until(lambda: service.engine.live == 0)
    service.wait_until(lambda: service.ended() == {"abort": len(service.engine.submitted)})
    return all(submitted.reason == "cancelled" for submitted in service.engine.submitted)


def test_f_client_gone_streaming(service: Any) -> None:
    read_and_leave(service)
    assert stands_still(service)


def test_f_client_gone_not_streaming(service: Any) -> None:
    wait_and_leave(service)
    assert stands_still(service)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def unfinished_tasks() -> int:
    """Of every event loop in this process."""
    return sum(type(one) is asyncio.Task and not one.done() for one in gc.get_objects())


@pytest.mark.parametrize("stream", [False, True])
def test_f_client_gone_while_it_waits(service: Any, stream: bool) -> None:
    first = threading.Thread(target=read_and_leave, args=(service, 20))
    first.start()
    service.wait_until(lambda: service.engine.live == 1)
    with service.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post(CHAT, json=ASK | {"stream": stream}, timeout=0.3)
    service.wait_until(lambda: service.engine.live == 1, 1.0)
    first.join()
    assert stands_still(service)
    assert service.engine.submitted[1].produced == 0


@contextmanager
def stalled(service: Any) -> Iterator[None]:
    """A client that asks for an endless answer and reads nothing of it."""
    host, port = service.url.removeprefix("http://").split(":")
    body = httpx.Request("POST", service.url, json=ASK | {"stream": True}).content
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        service.wait_until(lambda: service.engine.submitted)
        yield


def test_f_client_gone_stops_reading(service: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(streaming, "SLOW_READER_SECONDS", 0.5)
    service.engine.script = lambda *_: Script([50], endless=True, every_s=0.001)  # 100 s, if nobody ends it
    with stalled(service):
        service.wait_until(lambda: service.engine.live == 0, 10)
        assert service.engine.submitted[0].reason == "cancelled"
        assert "Dropped a client" in caplog.text
        service.say("still here")
        with service.http() as http:
            assert http.post(CHAT, json=ASK).status_code == 200


def test_f_client_gone_stops_reading_and_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SLOW_READER_SECONDS", 600)
    engine = ScriptedEngine(context_length=200_000, max_running=2)
    engine.script = lambda *_: Script([50], endless=True, every_s=0.001)
    with serving(tmp_path, engine) as service, stalled(service):
        service.wait_until(lambda: engine.submitted[0].produced > 2000, 60)  # more than any buffer takes
        for _ in range(3):
            read_and_leave(service, 200)
        assert engine.live >= 1
        assert engine.submitted[0].reason is None  # it is there still, and held nobody up


def test_f_client_gone_a_hundred_times(service: Any, caplog: Any) -> None:
    service.engine.script = lambda *_: Script([50], endless=True, every_s=0.005)
    descriptors, tasks = len(list(Path("/proc/self/fd").iterdir())), unfinished_tasks()
    digest = service.register("pirate")
    for half in range(2):
        for _ in range(25):
            read_and_leave(service)
            wait_and_leave(service, 0.03)
        gc.collect()
        if half == 0:
            resident = resident_bytes()
    assert stands_still(service)
    assert resident_bytes() < resident + 2**24
    assert 90 <= len(service.engine.submitted) <= 100  # some left before a busy server had read them
    gc.collect()
    service.wait_until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 1)
    service.wait_until(lambda: unfinished_tasks() <= tasks)
    assert service.app.state.blobs.path(digest).exists()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_f_client_gone_lets_go_of_the_variant(service: Any) -> None:
    digest = service.register("pirate")
    with service.http() as http, http.stream("POST", CHAT, json=ASK | {"model": "pirate", "stream": True}) as answer:
        lines = answer.iter_lines()  # dropping the iterator would close the stream
        next(lines)
        with service.http() as other:
            other.delete("/v1/variants/pirate")
        assert service.app.state.blobs.path(digest).exists()
    assert stands_still(service)
    service.wait_until(lambda: service.app.state.blobs.sweep(set) == 1)


def test_work_is_cancelled_when_the_client_leaves() -> None:
    cancelled = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def receive() -> dict[str, str]:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    assert asyncio.run(streaming.while_connected(receive, work())) is None
    assert cancelled == [True]
