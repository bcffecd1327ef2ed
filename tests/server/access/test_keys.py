"""Keys over real HTTP: who is let in, to what, and what is kept of a key."""

import re
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import OpenAI
from scripted_engine import ScriptedEngine
from scripted_service import Service, serving

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.access.door import PUBLIC, check_start, is_loopback
from deltaserve.server.access.keys import KeyStore
from deltaserve.server.settings import Settings

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with serving(tmp_path, ScriptedEngine()) as running:
        running.say("ok")
        yield running


def made(service: Service, *arguments: object, **options: object) -> str:
    return service.app.state.keys.create(*arguments, **options)[1]


def client(service: Service, key: str) -> OpenAI:
    return OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_without_keys_a_server_on_loopback_is_open_until_there_is_one(service: Service) -> None:
    with service.http() as http:
        assert http.get("/v1/models").status_code == 200
        key = made(service, "somebody", "admin")
        assert http.get("/v1/models").status_code == 401
        service.app.state.keys.revoke(key.split("-")[1])
        assert http.get("/v1/models", headers=bearer(key)).status_code == 401, "revoking the last key opens nothing"


def test_a_missing_and_a_wrong_key_are_401_in_openais_shape(service: Service) -> None:
    key = made(service, "somebody")
    with service.http() as http:
        for headers in ({}, {"Authorization": f"Basic {key}"}, bearer(f"{key}x"), bearer("sk-nonsense")):
            refused = http.get("/v1/models", headers=headers)
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (401, "invalid_api_key")
            assert error["type"] == "invalid_request_error"
            assert refused.headers["www-authenticate"] == "Bearer"
            assert key[20:] not in refused.text
    with pytest.raises(openai.AuthenticationError):
        client(service, "sk-wrong").chat.completions.create(model="base", messages=HELLO)


def test_every_route_is_closed_but_the_public_ones(service: Service) -> None:
    """So that a new route is closed until somebody opens it."""
    infer = made(service, "tenant")
    with service.http() as http:
        for template, methods in service.app.openapi()["paths"].items():
            path = re.sub(r"\{\w+\}", "0" * 64, template)
            for method in methods:
                status = http.request(method, path, json={}).status_code
                assert (status == 401) == (path.split("/")[1] not in {at[1:] for at in PUBLIC}), (method, path, status)
        for method, path in (
            *(("PUT", "/v1/variants/a"), ("DELETE", "/v1/variants/a"), ("GET", "/v1/variants"), ("GET", "/metrics")),
            *(("POST", "/v1/keys"), ("GET", "/v1/keys"), ("PUT", "/v1/limits/a"), ("GET", "/no/such/route")),
        ):
            refused = http.request(method, path, headers=bearer(infer))
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_permissions"), path
        for path in ("/v1/classify", "/classify"):
            answer = http.post(path, json={"model": "base", "input": "hi"}, headers=bearer(infer))
            assert "gives no embeddings and classes" in answer.json()["error"]["message"]


def test_a_key_sees_and_uses_only_its_models(service: Service) -> None:
    for name in ("team/a", "team/b", "other"):
        service.register(name)
    openai_client = client(service, made(service, "tenant", models=["team/*"]))
    assert [model.id for model in openai_client.models.list()] == ["team/a", "team/b"]
    assert openai_client.chat.completions.create(model="team/a", messages=HELLO).choices[0].message.content == "ok"
    for name in ("other", "base", "no-such-model"):
        for stream in (False, True):
            with pytest.raises(openai.PermissionDeniedError, match="may not use the model"):
                openai_client.chat.completions.create(model=name, messages=HELLO, stream=stream)
        with pytest.raises(openai.PermissionDeniedError):
            openai_client.models.retrieve(name)
    assert len(service.engine.submitted) == 1


def test_keys_over_http_are_shown_once_and_work_at_once(service: Service) -> None:
    admin = bearer(made(service, "root", "admin"))
    with service.http() as http:
        new = http.post("/v1/keys", headers=admin, json={"name": "ci", "requests_per_minute": 5, "models": ["base"]})
        assert new.status_code == 201
        text, details = new.json()["key"], new.json()["details"]
        assert (details["role"], details["models"], details["limits"]["requests_per_minute"]) == ("infer", ["base"], 5)
        assert http.get("/v1/models", headers=bearer(text)).status_code == 200
        assert text not in http.get("/v1/keys", headers=admin).text
        assert http.delete(f"/v1/keys/{details['id']}", headers=admin).json()["revoked"] is not None
        assert http.get("/v1/models", headers=bearer(text)).status_code == 401
        assert http.delete("/v1/keys/nobody", headers=admin).status_code == 404


def test_a_key_of_another_process_works_and_is_revoked_at_once(service: Service, tmp_path: Path) -> None:
    other = KeyStore(tmp_path / "keys.sqlite3")
    key, text = other.create("by the command line")
    with service.http() as http:
        assert http.get("/v1/models", headers=bearer(text)).status_code == 200
        other.revoke(key.id)
        assert http.get("/v1/models", headers=bearer(text)).status_code == 401
    other.close()


def test_only_a_hash_is_at_rest(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.sqlite3")
    _, text = store.create("somebody")
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    store.close()
    assert b"somebody" in kept
    assert text.encode() not in kept
    assert text.split("-", 2)[2].encode() not in kept


def test_an_address_that_others_reach_needs_keys_or_a_word(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys.sqlite3")
    reachable = Settings(base="base", store=tmp_path, host="0.0.0.0")
    with pytest.raises(OptionError, match=r"deltaserve keys create.*DELTASERVE_KEYS=off"):
        check_start(reachable, keys)
    check_start(Settings(base="base", store=tmp_path, host="0.0.0.0", keys="off"), keys)
    check_start(Settings(base="base", store=tmp_path), keys)
    keys.create("somebody", "admin")
    check_start(reachable, keys)
    keys.close()
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "example.org")] == [
        *(True, True, True, False, False, False)
    ]
