"""Versions over real HTTP: list, roll back, split, alias; with SQLite, and with a real Redis and a paused one."""

import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import httpx
import pytest
from redis_servers import free_port, redis_server, silent_server
from running_server import Running, artifact, running, wait_until


@pytest.fixture(scope="module")
def files(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    return [artifact(base, folder / f"{seed}.safetensors", seed=seed).read_bytes() for seed in range(3)]


@pytest.fixture(autouse=True)
def without_variants(server):
    yield
    for variant in server.http.get("/v1/variants").json()["data"]:
        server.http.delete(f"/v1/variants/{variant['id']}").raise_for_status()


def put(server: Running, name: str, content: bytes) -> str:
    response = server.http.put(f"/v1/variants/{name}", content=content)
    assert response.status_code == 201, response.text
    return response.json()["digest"]


def post(server: Running, path: str, status: int = 200, **body: object) -> dict:
    response = server.http.post(f"/v1/variants/{path}", json=body)
    assert response.status_code == status, response.text
    return response.json()


def served(server: Running, model: str, user: str | None = None) -> str:
    """The digest of the version that answered."""
    body = {"model": model, "prompt": [5, 6], "max_tokens": 1, "user": user}
    response = server.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.headers["x-deltaserve-version"]


def test_roll_back_goes_to_the_version_before_and_further(server, files):
    digests = [put(server, "team/v", content) for content in files]
    listed = server.http.get("/v1/variants/team/v/versions").json()
    assert [one["digest"] for one in listed["data"]] == digests[::-1]
    assert (listed["current"], listed["canary"], listed["share"]) == (digests[2], None, 0)
    for digest in (digests[1], digests[0]):
        assert post(server, "team/v/rollback")["current"] == digest == served(server, "team/v")
    message = post(server, "team/v/rollback", 400)["error"]["message"]
    assert "no version before" in message
    assert post(server, "team/v/rollback", digest=digests[2])["current"] == digests[2] == served(server, "team/v")
    assert len(server.http.get("/v1/variants/team/v/versions").json()["data"]) == 3


def test_roll_back_takes_no_body_too(server, files):
    first, _ = (put(server, "v", content) for content in files[:2])
    assert server.http.post("/v1/variants/v/rollback").json()["current"] == first


def test_a_split_is_by_user_or_at_random_and_ends_with_the_next_upload(server, files):
    canary, current, other = (put(server, "v", content) for content in files)
    post(server, "v/rollback", digest=current)
    split = post(server, "v/split", canary=canary, share=0.5)
    assert (split["current"], split["canary"], split["share"]) == (current, canary, 0.5)
    by_user = {f"user-{number}": served(server, "v", f"user-{number}") for number in range(12)}
    assert set(by_user.values()) == {current, canary}
    assert {user: served(server, "v", user) for user in by_user} == by_user
    counted = Counter(served(server, "v") for _ in range(40))
    assert set(counted) == {current, canary}
    assert put(server, "v", files[2]) == other == served(server, "v", "user-0")
    assert server.http.get("/v1/variants/v/versions").json()["canary"] is None


def test_a_split_can_be_ended(server, files):
    canary, current = (put(server, "v", content) for content in files[:2])
    post(server, "v/split", canary=canary, share=0.9)
    for _ in range(2):
        ended = server.http.delete("/v1/variants/v/split").json()
        assert (ended["current"], ended["canary"], ended["share"]) == (current, None, 0)
    assert {served(server, "v") for _ in range(20)} == {current}
    assert len(ended["data"]) == 2, "both versions are still there"
    assert server.http.delete("/v1/variants/w/split").json()["error"]["code"] == "model_not_found"


def test_another_name_can_point_at_a_version(server, files):
    first, second = (put(server, "v", content) for content in files[:2])
    assert post(server, "v/alias", 201, alias="stable", digest=first)["id"] == "stable"
    assert post(server, "v/alias", 201, alias="newest")["digest"] == second
    assert (served(server, "stable"), served(server, "newest")) == (first, second)
    server.http.delete("/v1/variants/v").raise_for_status()
    assert served(server, "stable") == first


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("v/rollback", {"digest": "0" * 64}, 404, "version_not_found"),
        ("v/rollback", {"digest": "short"}, 400, "invalid_value"),
        ("v/rollback", {"version": 1}, 400, "unknown_parameter"),
        ("w/rollback", {}, 404, "model_not_found"),
        ("v/split", {"canary": "0" * 64, "share": 0.5}, 404, "version_not_found"),
        ("v/split", {"canary": "0" * 64, "share": 1.5}, 400, "invalid_value"),
        ("v/split", {"share": 0.5}, 400, "missing_required_parameter"),
        ("v/alias", {"alias": "base"}, 400, "invalid_name"),
        ("v/alias", {"alias": "x", "digest": "0" * 64}, 404, "version_not_found"),
    ],
)
def test_what_cannot_be_is_refused(server, files, path, body, status, code):
    put(server, "v", files[0])
    assert post(server, path, status, **body)["error"]["code"] == code


def test_a_name_that_ends_in_an_action_is_refused(server, files):
    for action in ("versions", "rollback", "split", "alias"):
        refused = server.http.put(f"/v1/variants/team/{action}", content=files[0])
        assert refused.json()["error"]["code"] == "invalid_name"
    put(server, "versions", files[0])


@pytest.mark.parametrize("closes", [False, True, None])
def test_c_silent_registry_a_server_does_not_start_and_says_why(deltaserve, base, tmp_path, closes):
    absent = nullcontext(f"redis://127.0.0.1:{free_port()}/0")
    with absent if closes is None else silent_server(closes) as url:
        status, _, err = deltaserve("serve", base, "--store", tmp_path / "store", "--port", 0, "--registry", url)
    assert status == 1
    assert err.startswith(f"Error: The registry {url} does not answer")
    assert err.count("\n") == 1


def test_c_silent_registry_over_http(base, tmp_path, files):
    """While Redis is paused: what is known answers, new names are a 503 in time; then it goes on."""
    with redis_server(tmp_path) as redis, running(base, tmp_path / "store", registry=redis.url) as server:
        known = put(server, "v", files[0])
        assert server.http.get("/ready").json() == {"status": "ready", "registry": "ok"}
        redis.process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url) as other:
            body = {"model": "new", "prompt": [5], "max_tokens": 1}
            asking = pool.submit(server.http.post, "/v1/completions", json=body)
            assert other.get("/health").status_code == 200
            assert not asking.done(), "the registry was not waited for"
            refused = asking.result()
        assert time.monotonic() - begun < 5
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "registry_unavailable")
        assert "variants that were served before still are" in refused.json()["error"]["message"]
        begun = time.monotonic()
        assert served(server, "v") == known
        assert served(server, "base")
        assert server.http.get("/health").status_code == 200
        assert [one["id"] for one in server.http.get("/v1/models").json()["data"]] == ["base", "v"]
        assert time.monotonic() - begun < 2
        assert server.http.put("/v1/variants/w", content=files[1]).status_code == 503
        assert server.http.get("/ready").json()["registry"].startswith("down: ")
        redis.process.send_signal(signal.SIGCONT)
        wait_until(lambda: server.http.get("/ready").json()["registry"] == "ok")
        assert served(server, "v") == known
        assert put(server, "w", files[1]) == served(server, "w")
