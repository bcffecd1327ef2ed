"""Hints, pins and tiers over HTTP."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from running_server import artifact, running, wait_until


def put(server, name, folder, base, seed):
    return server.http.put(f"/v1/variants/{name}", content=artifact(base, folder / f"{seed}", seed=seed).read_bytes())


def tier(server, name):
    return server.http.get(f"/v1/variants/{name}").json()["current"]["tier"]


def test_a_hint_a_pin_and_a_new_version_of_a_pinned_variant(server, base, tmp_path):
    assert put(server, "v", tmp_path, base, 1).json()["tier"] == "store"
    assert server.http.post("/v1/variants/v/prefetch").status_code == 202
    wait_until(lambda: tier(server, "v") == "resident")
    pinned = server.http.put("/v1/variants/v/pin")
    assert (pinned.status_code, pinned.json()["tier"], pinned.json()["pinned"]) == (200, "resident", True)
    put(server, "v", tmp_path, base, 2)
    wait_until(lambda: tier(server, "v") == "resident")
    server.http.post("/v1/variants/v/rollback").raise_for_status()
    wait_until(lambda: tier(server, "v") == "resident")
    assert server.http.get("/v1/variants").json()["data"][0]["pinned"]
    assert not server.http.delete("/v1/variants/v/pin").json()["pinned"]
    server.http.put("/v1/variants/v/pin").raise_for_status()
    server.http.delete("/v1/variants/v").raise_for_status()
    assert server.app.state.engine.bank.pinned == frozenset()


@pytest.mark.parametrize(("method", "action"), [("POST", "prefetch"), ("PUT", "pin"), ("DELETE", "pin")])
def test_an_unknown_variant_is_not_found(server, method, action):
    answer = server.http.request(method, f"/v1/variants/nobody/{action}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_server_starts_with_its_pinned_variants(base, tmp_path):
    with running(base, tmp_path / "store") as server:
        put(server, "org/v", tmp_path, base, 1)
    with running(base, tmp_path / "store", pin="org/v", bank_slots=2) as server:
        assert tier(server, "org/v") == "resident"
        put(server, "w", tmp_path, base, 2)
        refused = server.http.put("/v1/variants/w/pin")
        assert (refused.status_code, "raise bank_slots" in refused.json()["error"]["message"]) == (400, True)


def test_d_remove_while_busy_over_http(server, base, tmp_path):
    """Three streams, one of them with four choices, and one of the base; then two deletes at once."""
    put(server, "v", tmp_path, base, 1).raise_for_status()
    begun = threading.Barrier(5)

    def follow(model, n):
        body = {"model": model, "prompt": [5], "max_tokens": 150, "temperature": 0, "ignore_eos": True, "stream": True}
        with (
            httpx.Client(base_url=server.url, timeout=60) as client,
            client.stream("POST", "/v1/completions", json={**body, "n": n}) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            begun.wait(60)
            return [line for line in lines if line]

    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(follow, model, n) for model, n in (("v", 1), ("v", 4), ("v", 1), ("base", 1))]
        begun.wait(60)
        start = time.monotonic()
        deletes = list(pool.map(lambda _: httpx.delete(f"{server.url}/v1/variants/v", timeout=60), range(2)))
        assert time.monotonic() - start < 5
        assert sorted(answer.status_code for answer in deletes) == [200, 404]
        assert server.http.post("/v1/completions", json={"model": "v", "prompt": [5]}).status_code == 404
        for stream in streams:
            lines = stream.result()
            assert lines[-1] == "data: [DONE]"
            assert not any("error" in line for line in lines)
    bank = server.app.state.engine.bank
    wait_until(lambda: bank.holders == {} and bank.used_bytes == 0)
    assert server.http.post("/v1/completions", json={"model": "base", "prompt": [5], "max_tokens": 2}).is_success
