"""The page's files and the route with its figures, without a browser."""

import re
from pathlib import Path

import httpx
import pytest
from running_server import Running, artifact, running
from tiny_models import save, tiny_llama

from deltaserve.server.console import page as module

STATIC = Path(module.__file__).parent / "static"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    base = save(tiny_llama(), folder / "base", vocab=64)
    with running(base, folder / "store") as server:
        for name in ("team/a", "b"):
            file = artifact(base, folder / "artifact", seed=len(name))
            server.http.put(f"/v1/variants/{name}", content=file.read_bytes()).raise_for_status()
        yield server


def test_the_page_lets_nothing_foreign_in_and_is_asked_again_after_an_upgrade(server: Running) -> None:
    answer = httpx.get(f"{server.url}/console", follow_redirects=True)
    assert (answer.status_code, answer.url.path) == (200, "/console/")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-cache"
    again = httpx.get(answer.url, headers={"if-none-match": answer.headers["etag"]})
    assert again.status_code == 304


def test_every_file_that_another_names_is_served_and_none_is_elsewhere(server: Running) -> None:
    for file in STATIC.iterdir():
        text = file.read_text()
        assert httpx.get(f"{server.url}/console/{file.name}").status_code == 200
        for name in re.findall(r"""(?:src|href|from|import)[= ]"([\w./]+\.(?:js|css|svg))\"""", text):
            assert (STATIC / name).exists(), f"{file.name} names {name}"
        assert not re.findall(r"""["'(]https?://(?!www\.w3\.org/2000/svg)""", text), f"{file.name} names another host"


def test_what_is_not_there_is_an_error_in_openais_shape(server: Running) -> None:
    for path in ("nothing.js", "../app.py", "%2e%2e/figures.py"):
        answer = httpx.get(f"{server.url}/console/{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


def test_figures_count_what_was_asked(server: Running) -> None:
    ask = {"model": "b", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "ignore_eos": True}
    before = server.http.get("/v1/console").raise_for_status().json()
    server.http.post("/v1/chat/completions", json=ask).raise_for_status()
    after = server.http.get("/v1/console").json()
    count = after["counts"]["b"]
    assert (count["requests"], count["first_tokens"], count["tokens"], count["in_flight"]) == (1, 1, 4, 0)
    assert 0 < count["first_token_s"] <= count["request_s"] < 30
    assert after["clock_s"] > before["clock_s"]
    digest = server.http.get("/v1/variants/b").json()["current"]["digest"]
    assert after["memory"]["resident"] == [digest]
    assert (after["base"]["id"], after["base"]["kind"], after["caller"]["role"]) == ("base", "decoder", "admin")
    assert (
        after["base"]["bytes"]
        == 2 * after["base"]["parameters"]
        == 2 * sum(p.numel() for p in tiny_llama().parameters())
    )


def test_with_keys_the_page_is_open_and_the_figures_are_of_what_the_key_may_ask(server: Running) -> None:
    for name in ("team/a", "b"):
        server.http.put(f"/v1/variants/{name}/pin").raise_for_status()
    key = server.app.state.keys.create("alice", "infer", ["team/*"])[1]
    assert httpx.get(f"{server.url}/console/").status_code == 200
    assert httpx.get(f"{server.url}/v1/console").status_code == 401
    mine = httpx.get(f"{server.url}/v1/console", headers={"authorization": f"Bearer {key}"}).json()
    assert (mine["keys"], mine["caller"]) == (True, {"name": "alice", "role": "infer", "models": ["team/*"]})
    assert mine["memory"]["pinned"] == ["team/a"]
    assert len(mine["memory"]["resident"]) == 1
    assert set(mine["counts"]) <= {"team/a"}
