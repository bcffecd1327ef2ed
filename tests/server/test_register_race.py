"""Many uploads at once, of one name and of many (case C-register-race), with either registry."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from redis_servers import redis_server
from running_server import Running, artifact, running, serving


@pytest.fixture
def made(base, tmp_path):
    """Make the bytes of an artifact that differs with ``seed``."""
    return lambda seed: artifact(base, tmp_path / f"{seed}.safetensors", seed=seed).read_bytes()


def put(server: Running, name: str, content: bytes) -> dict:
    response = server.http.put(f"/v1/variants/{name}", content=content)
    assert response.status_code == 201, response.text
    return response.json()


def listed(server: Running) -> list[str]:
    return [one["id"] for one in server.http.get("/v1/variants").json()["data"]]


def answers(server: Running, model: str) -> bool:
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    response = server.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return bool(response.json()["choices"][0]["text"])


@pytest.fixture(params=["sqlite", "redis"])
def server(request, base, tmp_path):
    """A server of server registry."""
    with ExitStack() as stack:
        redis = request.param == "redis"
        address = stack.enter_context(redis_server(tmp_path)).url if redis else "sqlite"
        yield stack.enter_context(running(base, tmp_path / "store", registry=address))


def test_c_register_race_one_name(server, made):
    """Twenty uploads of one name are twenty versions; the name points at the last, and every file is one of them."""
    contents = [made(seed) for seed in range(20)]
    with ThreadPoolExecutor(20) as pool:
        receipts = list(pool.map(lambda content: put(server, "v", content), contents))
    assert sorted(receipt["version"] for receipt in receipts) == list(range(1, 21))
    assert listed(server) == ["v"]
    current = server.http.get("/v1/variants/v").json()["current"]
    assert current["version"] == 20
    stored = server.app.state.blobs.path(current["digest"])
    assert hashlib.sha256(stored.read_bytes()).hexdigest() == current["digest"]
    assert {name for name in server.files() if not name.startswith("profiles/")} == {
        f"blobs/{receipt['digest']}" for receipt in receipts
    }


def test_c_register_race_twenty_names_and_a_reader(server, made):
    """Every name that the list shows can be asked at once."""
    contents = [made(seed) for seed in range(20)]
    seen: set[str] = set()
    finished = threading.Event()

    def read() -> None:
        while not finished.is_set():
            for name in set(listed(server)) - seen:
                assert answers(server, name)
                seen.add(name)

    with ThreadPoolExecutor(21) as pool:
        reader = pool.submit(read)
        list(pool.map(lambda number: put(server, f"v{number}", contents[number]), range(20)))
        finished.set()
        reader.result()
    assert set(listed(server)) == {f"v{number}" for number in range(20)}


def test_c_register_race_delete_and_again_while_a_request_runs(server, made):
    put(server, "v", made(1))
    body = {"model": "v", "prompt": [5], "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        with httpx.Client(base_url=server.url) as other:
            assert other.delete("/v1/variants/v").status_code == 200
            assert other.put("/v1/variants/v", content=made(1)).status_code == 201
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert not any("error" in line for line in rest)


def test_c_register_race_two_servers_on_one_store(base, tmp_path, made):
    contents = [made(seed) for seed in range(10)]
    store: Path = tmp_path / "store"
    with serving(base, store) as (one, _), serving(base, store) as (two, _), httpx.Client(timeout=60) as http:

        def upload(job: tuple[int, str]) -> int:
            number, url = job
            return http.put(f"{url}/v1/variants/v", content=contents[number]).status_code

        with ThreadPoolExecutor(10) as pool:
            jobs = [(number, one if number % 2 else two) for number in range(10)]
            assert set(pool.map(upload, jobs)) == {201}
        current = [http.get(f"{url}/v1/variants/v").json()["current"] for url in (one, two)]
        assert current[0] == current[1]
        assert current[0]["version"] == 10
        assert http.delete(f"{one}/v1/variants/v").status_code == 200
        assert http.get(f"{two}/v1/variants/v").status_code == 404
    assert list((store / "blobs").glob("[0-9a-f]*")) == []
