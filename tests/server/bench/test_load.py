import asyncio

import pytest
from fake_server import FakeServer, Script, fake_server

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.bench.client import Ask, Asking, Outcome, Record
from deltaserve.server.bench.load import closed_loop, endpoint_root, open_client, open_loop, served_models

QUICK = Script(first_s=0.05, every_s=0.001)


def load(server: FakeServer, asking: Asking, concurrency: int, requests: int = 12) -> list[Record]:
    async def go() -> list[Record]:
        async with open_client(server.url, api_key="secret") as client:
            return await closed_loop(client, asking, [Ask("m", f"prompt {n}") for n in range(requests)], concurrency)

    return asyncio.run(go())


@pytest.mark.parametrize("concurrency", [1, 4])
def test_closed_loop_keeps_so_many_under_way(concurrency: int) -> None:
    with fake_server(m=QUICK) as server:
        records = load(server, Asking(), concurrency)
    assert [record.outcome for record in records] == [Outcome.COMPLETED] * 12
    assert server.most_under_way == concurrency
    assert {body["messages"][0]["content"] for body in server.bodies} == {f"prompt {n}" for n in range(12)}


def open_load(server: FakeServer, due_s: list[float], at_most: int | None = None) -> list[Record]:
    async def go() -> list[Record]:
        async with open_client(server.url) as client:
            return await open_loop(client, Asking(), [Ask("m", "prompt")] * len(due_s), due_s, at_most)

    return asyncio.run(go())


def test_open_loop_sends_what_is_due_whether_others_have_ended_or_not() -> None:
    with fake_server(m=Script(first_s=0.5, every_s=0.001)) as server:
        records = open_load(server, [0.1 * n for n in range(5)])
    assert [record.outcome for record in records] == [Outcome.COMPLETED] * 5
    assert server.most_under_way == 5
    assert [sent.arrived - server.sent[0].arrived for sent in server.sent] == pytest.approx(
        [0.1 * n for n in range(5)], abs=0.02 + 2 * server.lag_s
    )


def test_open_loop_counts_from_when_a_request_was_due_not_from_when_it_was_sent() -> None:
    """Four requests at once and one place for them: the last one's first token takes four answers' time."""
    with fake_server(m=Script(first_s=0.1, tokens=1)) as server:
        records = open_load(server, [0.0] * 4, at_most=1)
    assert server.most_under_way == 1
    waits = [record.ttft for record in records]
    assert [waits[n] >= 0.1 * (n + 1) for n in range(4)] == [True] * 4
    assert waits[3] >= 0.4


def test_more_clients_than_the_pool_of_httpx_has_by_default() -> None:
    with fake_server(m=Script(first_s=2.0, tokens=1)) as server:
        load(server, Asking(), concurrency=130, requests=130)
    assert server.most_under_way == 130


def test_completions_endpoint_and_every_option_reach_the_server() -> None:
    with fake_server(m=QUICK) as server:
        records = load(server, Asking("completions", max_tokens=7, temperature=0.5, ignore_eos=True), 1, requests=1)
    assert records[0].outcome is Outcome.COMPLETED
    assert server.bodies == [
        {
            "model": "m",
            "prompt": "prompt 0",
            "max_tokens": 7,
            "temperature": 0.5,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
    ]
    assert server.headers[0]["authorization"] == "Bearer secret"


def test_field_that_is_not_openais_is_sent_only_if_asked_for() -> None:
    with fake_server(m=QUICK) as server:
        load(server, Asking(), 1, requests=1)
    assert "ignore_eos" not in server.bodies[0]


def test_server_that_goes_away_is_a_failed_request() -> None:
    with fake_server(m=QUICK) as server:
        pass
    records = load(server, Asking(), 1, requests=1)
    assert records[0].outcome is Outcome.FAILED
    assert records[0].reason.startswith("ConnectError")


@pytest.mark.parametrize("url", ["http://host:1", "http://host:1/", "http://host:1/v1", "http://host:1/v1/"])
def test_address_with_or_without_v1(url: str) -> None:
    assert endpoint_root(url) == "http://host:1/v1"


def test_address_without_scheme_is_refused() -> None:
    with pytest.raises(OptionError, match="http://host:port"):
        endpoint_root("localhost:8000")


def test_no_server_to_list_models() -> None:
    async def ask() -> list[str]:
        async with open_client("http://127.0.0.1:9") as client:
            return await served_models(client)

    with pytest.raises(OptionError, match=r"127\.0\.0\.1:9/v1/ does not list its models"):
        asyncio.run(ask())
