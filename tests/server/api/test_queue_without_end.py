"""More requests than the server can take (case F-queue-without-end): 2 run, 4 wait, 50 come at once."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI, RateLimitError
from scripted_engine import Script, ScriptedEngine, ids
from scripted_service import serving

ASK: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Any]:
    engine = ScriptedEngine(max_running=2, max_waiting=4)
    engine.script = lambda *_: Script(ids(engine.tokenizer, "abcd"), every_s=0.25)
    with serving(tmp_path, engine) as running:
        yield running


def test_f_queue_without_end(service: Any) -> None:
    def send(number: int, one: httpx.Client) -> httpx.Response:
        with nullcontext(one) if number and burst == 2 else service.http() as http:
            return http.post("/v1/chat/completions", json=ASK | {"stream": number % 2 == 0})

    def everyone_came() -> bool:
        return bool(service.engine.rejected == 44)

    tokens = ids(service.engine.tokenizer, "abcd")
    service.engine.script = lambda *_: Script(tokens, begins=everyone_came)
    for burst in (1, 2):  # by fifty clients, then by one client that sends 49
        service.engine.rejected = 0
        with service.http() as one, ThreadPoolExecutor(50) as pool:
            sent = [pool.submit(send, number, one) for number in range(50)]
            with service.http() as http:
                paths = ("/health", "/ready", "/v1/models", "/metrics")
                assert [http.get(path).status_code for path in paths] == [200] * 4
            answers = [one.result() for one in sent]
        accepted = [answer for answer in answers if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert (len(accepted), len(refused), service.engine.rejected) == (6, 44, 44)
        assert all('"finish_reason":"stop"' in answer.text for answer in accepted)
        for answer in refused:
            assert int(answer.headers["retry-after"]) >= 1
            error = answer.json()["error"]
            assert (error["type"], error["param"], error["code"]) == ("rate_limit_error", None, "queue_full")
        service.wait_until(lambda: service.engine.live == 0)
        service.wait_until(lambda burst=burst: service.ended() == {"stop": 6 * burst})
        assert service.refused("queue_full") == 44 * burst


def test_f_queue_without_end_n_counts_as_n_and_comes_whole_or_not_at_all(service: Any) -> None:
    client: OpenAI = service.openai()
    with pytest.raises(RateLimitError):
        client.chat.completions.create(**ASK, n=7)
    service.wait_until(lambda: service.engine.live == 0)
    assert [submitted.reason for submitted in service.engine.submitted] == ["cancelled"] * 6
    answer = client.chat.completions.create(**ASK, n=6)
    assert [choice.message.content for choice in answer.choices] == ["abcd"] * 6
