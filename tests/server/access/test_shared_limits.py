"""Limits of several servers with one real Redis: counted together, exactly, and loosened where Redis goes away."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis_servers import redis_server
from scripted_engine import ScriptedEngine
from scripted_service import Service, serving

from deltaserve.delta_store.errors import RequestLimitReached
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


def test_at_once_no_more_pass_than_may(tmp_path: Path) -> None:
    """What one server sees as room may be taken by another before it counts."""
    subject = [Subject("s", "S", Limits(requests=10))]

    async def enter_all(rates: Rates) -> int:
        async def enter() -> bool:
            try:
                await rates.enter(subject, 1)
            except RequestLimitReached:
                return False
            return True

        return sum(await asyncio.gather(*(enter() for _ in range(20))))

    with redis_server(tmp_path) as redis, ThreadPoolExecutor(4) as pool:
        servers = [Rates(redis.url) for _ in range(4)]
        assert sum(pool.map(lambda rates: asyncio.run(enter_all(rates)), servers)) == 10
        for rates in servers:
            rates.close()
