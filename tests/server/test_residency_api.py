"""Hints, pins and tiers over HTTP."""

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
