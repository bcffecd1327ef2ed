"""SIGTERM to a process of `deltaserve serve` while a request runs."""

import json
import signal
from pathlib import Path

import httpx
from running_server import serving, wait_until
from tiny_models import save, tiny_llama

TOKENS = 600


def test_what_runs_is_finished_and_nothing_new_is_taken(tmp_path: Path) -> None:
    base = save(tiny_llama(context=2048), tmp_path / "base", vocab=64)
    long = {"model": "base", "prompt": "a", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    with (
        serving(base, tmp_path / "store", "--shutdown-seconds", "60") as (url, process),
        httpx.Client(base_url=url, timeout=30) as http,
        http.stream("POST", "/v1/completions", json=long | {"stream_options": {"include_usage": True}}) as running,
    ):
        lines = running.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: http.get("/ready").status_code == 503)
        assert http.get("/health").status_code == 200
        refused = http.post("/v1/completions", json={"model": "base", "prompt": "a", "max_tokens": 1})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in refused.headers
        events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["usage"]["completion_tokens"] == TOKENS
        assert process.wait(20) == 0
