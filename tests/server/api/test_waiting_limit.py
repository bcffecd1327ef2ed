"""A waiting-time limit of 1 s (case F-queue-without-end): whose turn does not come is told so and leaves the queue."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_server import Running, artifact, running, wait_until
from tiny_encoders import save_encoder, tiny_encoder
from tiny_models import save, tiny_llama

LONG: dict[str, Any] = {"model": "base", "prompt": "The sea", "max_tokens": 200, "ignore_eos": True, "stream": True}
STEP_S = 0.02
"""Of a slowed model: the long answer takes four times as long as others may wait."""


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """Two requests run and eight wait; one slot for variants."""
    base = save(tiny_llama(vocab=260), tmp_path / "base", vocab=260)
    with running(base, tmp_path / "store", max_running=2, max_waiting=8, max_wait_seconds=1, bank_slots=1) as server:
        for seed, name in enumerate("ab"):
            file = artifact(base, tmp_path / name, seed=seed)
            server.http.put(f"/v1/variants/{name}", content=file.read_bytes()).raise_for_status()
        reports = server.app.state.engine._batching.reports
        monkeypatch.setattr(reports, "generated", lambda *_: time.sleep(STEP_S))
        yield server


@contextmanager
def streaming(server: Running, body: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of a stream whose first one is there."""
    with (
        httpx.Client(base_url=server.url, timeout=60) as http,
        http.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()  # kept: dropping the iterator would close the stream
        events = (json.loads(line[6:]) for line in lines if line.startswith("data: {"))
        next(events)
        yield events


def is_whole(events: Iterator[dict[str, Any]], choices: int = 1) -> bool:
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    return [reason for reason in reasons if reason] == ["length"] * choices


def refused(server: Running, body: dict[str, Any]) -> bool:
    """Whether it is told to come back, as where the queue is full."""
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
    assert "within 1 s" in error["message"]
    return int(answer.headers["retry-after"]) >= 1


def counted(server: Running) -> tuple[int, dict[str, int]]:
    """Requests that were rejected; choices that ended, by how."""
    metrics = server.app.state.metrics
    (ended,) = metrics.ended.collect()
    totals = {s.labels["finished_reason"]: int(s.value) for s in ended.samples if s.name.endswith("_total")}
    return int(metrics.refused.labels("queue_full")._value.get()), totals


def is_quiet(server: Running) -> bool:
    state = server.app.state.engine.state()
    return (state.running, state.waiting, state.cold) == (0, 0, 0)


def test_f_queue_without_end_no_place_in_the_batch_in_time(slow: Running) -> None:
    short = LONG | {"max_tokens": 2}
    late = [short, short | {"stream": False}, short | {"n": 2}, short | {"model": "a"}, short | {"prompt": ["x", "y"]}]
    with streaming(slow, LONG) as first, streaming(slow, LONG) as second, ThreadPoolExecutor(len(late)) as pool:
        assert list(pool.map(lambda body: refused(slow, body), late)) == [True] * len(late)
        assert is_whole(first)
        assert is_whole(second)
    wait_until(lambda: is_quiet(slow))
    wait_until(lambda: counted(slow) == (5, {"length": 2}))
    assert set(slow.app.state.engine.bank.holders.values()) <= {0}
    assert slow.http.post("/v1/completions", json=short | {"stream": False}).status_code == 200


def test_f_queue_without_end_no_slot_for_its_variant_in_time(slow: Running) -> None:
    with streaming(slow, LONG | {"model": "a"}) as events:
        assert refused(slow, LONG | {"model": "b"})
        assert slow.app.state.engine.bank.waiting == 0
        assert is_whole(events)
    wait_until(lambda: is_quiet(slow))
    wait_until(lambda: counted(slow) == (1, {"length": 1}))
    assert slow.http.post("/v1/completions", json=LONG | {"model": "b", "max_tokens": 2}).status_code == 200


def test_f_queue_without_end_an_answer_that_streams_waits_for_its_other_choices(slow: Running) -> None:
    """Two of four run; the others wait for longer than 1 s, and their answer stays whole."""
    with streaming(slow, LONG | {"n": 4, "max_tokens": 100}) as events:
        assert is_whole(events, choices=4)
    wait_until(lambda: counted(slow) == (0, {"length": 4}))


def test_f_queue_without_end_texts_that_no_batch_takes_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_encoder(tiny_encoder(), tmp_path / "base")
    opened, body = threading.Event(), {"model": "base", "input": "hello"}
    with running(base, tmp_path / "store", max_wait_seconds=1) as server, ThreadPoolExecutor(2) as pool:
        engine = server.app.state.engine
        run = engine._batches._run_batch

        def held(batch: Any) -> Any:
            assert opened.wait(60)
            return run(batch)

        monkeypatch.setattr(engine._batches, "_run_batch", held)
        first = pool.submit(httpx.post, f"{server.url}/v1/embeddings", json=body, timeout=60)
        wait_until(lambda: engine.state().running == 1)
        second = pool.submit(httpx.post, f"{server.url}/v1/embeddings", json=body, timeout=60)
        wait_until(lambda: engine.state().waiting == 1)
        time.sleep(1.1)
        opened.set()
        assert first.result().status_code == 200
        error = second.result().json()["error"]
        assert (second.result().status_code, error["code"]) == (429, "queue_full")
        wait_until(lambda: counted(server) == (1, {"stop": 1}))
        assert engine.requests == 0
