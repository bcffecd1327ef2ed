"""Limits and usage over real HTTP: OpenAI's 429, its headers, both kinds of subject, and what is written down."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI
from scripted_engine import ScriptedEngine
from scripted_service import Service, serving

from deltaserve.delta_store.errors import RequestLimitReached, TokenLimitReached
from deltaserve.server.access.counters import Counters
from deltaserve.server.access.keys import Limits
from deltaserve.server.access.rates import Rates, Subject

HELLO = [{"role": "user", "content": "hi"}]


def key_of(service: Service, **limits: int) -> str:
    return service.app.state.keys.create("tenant", limits=Limits(**limits))[1]


def ask(service: Service, key: str, model: str = "base", **more: object) -> httpx.Response:
    with service.http() as http:
        body = {"model": model, "messages": HELLO} | more
        return http.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})


def test_requests_a_minute_of_a_key(tmp_path: Path) -> None:
    with serving(tmp_path, ScriptedEngine()) as service:
        service.say("ok")
        key, other = key_of(service, requests=2), key_of(service)
        answers = [ask(service, key) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
        error = answers[2].json()["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert 1 <= int(answers[2].headers["retry-after"]) <= 60
        with pytest.raises(openai.RateLimitError, match="2 requests a minute"):
            OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0).chat.completions.create(
                model="base", messages=HELLO
            )
        assert ask(service, other).status_code == 200, "one key's limit is nobody else's"
        assert len(service.engine.submitted) == 3


def test_tokens_a_minute_count_prompt_and_answer(tmp_path: Path) -> None:
    with serving(tmp_path, ScriptedEngine()) as service:
        service.say("x" * 30)
        key = key_of(service, tokens=60)
        first = ask(service, key)
        assert first.status_code == 200
        used = first.json()["usage"]
        assert int(first.headers["x-ratelimit-remaining-tokens"]) == 60 - used["prompt_tokens"]
        refused = ask(service, key)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
        assert int(refused.headers["x-ratelimit-remaining-tokens"]) == 60 - used["total_tokens"]


def test_a_variants_own_limit_counts_for_all_keys_together(tmp_path: Path) -> None:
    with serving(tmp_path, ScriptedEngine()) as service:
        service.say("ok")
        service.register("busy")
        keys = [key_of(service), key_of(service)]
        admin = service.app.state.keys.create("root", "admin")[1]
        with service.http() as http:
            http.headers["Authorization"] = f"Bearer {admin}"
            assert http.put("/v1/limits/busy", json={"requests_per_minute": 1}).status_code == 200
            assert [one["model"] for one in http.get("/v1/limits").json()["data"]] == ["busy"]
            assert [ask(service, key, "busy").status_code for key in keys] == [200, 429]
            assert ask(service, keys[0]).status_code == 200
            http.put("/v1/limits/busy", json={})
            assert ask(service, keys[0], "busy").status_code == 200


def test_requests_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, ScriptedEngine()) as service, ThreadPoolExecutor(1) as pool:
        go = False
        service.say("ok", begins=lambda: go)
        key = key_of(service, concurrent=1)
        running = pool.submit(ask, service, key)
        service.wait_until(lambda: service.engine.live == 1)
        refused = ask(service, key, stream=True)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        go = True
        assert running.result().status_code == 200
        assert ask(service, key).status_code == 200


def test_usage_by_day_key_and_model_is_there_after_a_restart(tmp_path: Path) -> None:
    with serving(tmp_path, ScriptedEngine()) as service:
        service.say("abc")
        service.register("v")
        key, other = key_of(service), key_of(service)
        used = [ask(service, key, "v").json()["usage"], ask(service, key, "v", stream=True), ask(service, other)][0]
    with serving(tmp_path, ScriptedEngine()) as service, service.http() as http:
        (own,) = http.get("/v1/usage", headers={"Authorization": f"Bearer {key}"}).json()["data"]
        assert (own["key"], own["model"], own["requests"], own["failed"]) == (key.split("-")[1], "v", 2, 0)
        assert own["prompt_tokens"] == 2 * used["prompt_tokens"]
        assert own["completion_tokens"] == 2 * used["completion_tokens"] == 6
        admin = {"Authorization": f"Bearer {service.app.state.keys.create('root', 'admin')[1]}"}
        assert len(http.get("/v1/usage", headers=admin).json()["data"]) == 2
        assert http.get("/v1/usage?start=2020-01-01&end=2020-01-31", headers=admin).json()["data"] == []
        assert http.get("/v1/usage?start=2020-01-01", headers=admin).status_code == 400


@pytest.mark.anyio
async def test_what_an_answer_takes_beyond_the_minute_is_owed() -> None:
    rates, subject = Rates(), [Subject("s", "S", Limits(tokens=100))]
    await rates.enter(subject, 10)
    rates.leave(subject, 500)
    with pytest.raises(TokenLimitReached) as refused:
        await rates.enter(subject, 1)
    assert 60 <= int(refused.value.headers["retry-after"]) <= 120
    assert rates._owed["s"] == 410


@pytest.mark.anyio
async def test_a_storage_that_does_not_answer_turns_nobody_away() -> None:
    rates, subject = Rates("redis://127.0.0.1:9"), [Subject("s", "S", Limits(requests=1))]
    await rates.enter(subject, 1)
    rates.leave(subject, 1)
    with pytest.raises(RequestLimitReached):
        await rates.enter(subject, 1)
    rates.close()


def test_seconds_until_there_is_room_are_enough() -> None:
    counters = Counters("memory://")
    assert counters.seconds_until("s", 100, 100) == 0
    counters.count_tokens("s", 100, 80)
    assert counters.seconds_until("s", 100, 20) == 0
    assert 0 < counters.seconds_until("s", 100, 60) < counters.seconds_until("s", 100, 100) <= 120


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
