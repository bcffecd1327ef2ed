"""Limits of several servers with one real Redis: counted together, exactly, and loosened where Redis goes away."""

import asyncio
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis_servers import redis_server
from scripted_engine import ScriptedEngine
from scripted_service import Service, serving

from deltaserve.delta_store.errors import RequestLimitReached
from deltaserve.server.access.counters import Room
from deltaserve.server.access.keys import Limits
from deltaserve.server.access.rates import Rates, Subject

LIMIT = 5


def ask(service: Service) -> int:
    with service.http() as http:
        return http.post("/v1/completions", json={"model": "base", "prompt": "a", "max_tokens": 10}).status_code


@pytest.mark.parametrize("limit", [{"variant_requests_per_minute": LIMIT}, {"variant_tokens_per_minute": 3 * LIMIT}])
def test_replicas_count_together(tmp_path: Path, limit: dict[str, int]) -> None:
    with redis_server(tmp_path) as redis, ExitStack() as stack:
        replicas = []
        for name in ("one", "two"):
            settings = {"limits_storage": redis.url, **limit}
            service = stack.enter_context(serving(tmp_path / name, ScriptedEngine(), **settings))
            service.say("bc")  # with the prompt, three tokens a request
            replicas.append(service)
        statuses = []
        for turn in range(LIMIT + 2):
            statuses.append(ask(replicas[turn % 2]))
            replicas[turn % 2].app.state.visits.rates._afterwards.submit(lambda: None).result()  # the answer is counted
        assert statuses == [200] * LIMIT + [429] * 2
        redis.process.kill()
        redis.process.wait()
        assert [ask(replica) for replica in replicas] == [200, 200], "without Redis nobody is turned away"


def test_what_another_server_took_meanwhile_is_not_given_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = [Subject("s", "S", Limits(requests=1))]
    with redis_server(tmp_path) as redis:
        one, other = Rates(redis.url), Rates(redis.url)
        look = one._shared.requests
        looks: list[Room] = []

        def look_then_be_overtaken(subject_id: str, limit: int) -> Room:
            looks.append(look(subject_id, limit))
            if len(looks) == 1:
                asyncio.run(other.enter(subject, 1))
            return looks[-1]

        monkeypatch.setattr(one._shared, "requests", look_then_be_overtaken)
        with pytest.raises(RequestLimitReached, match="1 requests a minute"):
            asyncio.run(one.enter(subject, 1))
        assert [room.remaining for room in looks] == [1, 0]
        for rates in (one, other):
            rates.close()
