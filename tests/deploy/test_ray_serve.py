"""deltaserve on real Ray: two replicas of a tiny model behind the router, one of which is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from running_server import ENVIRONMENT, SMALL, artifact, wait_until
from tiny_models import save, tiny_llama

pytest.importorskip("ray.serve", reason="the extra 'ray' is not installed")
pytestmark = pytest.mark.timeout(600)  # Ray starts a dozen processes

ROOT = Path(__file__).parents[2]
GOSSIP_SECONDS = 3.0
"""Replicas tell Ray's routers about once a second which models they have."""
LONG = {"max_tokens": 6000, "stream": True, "ignore_eos": True}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(context=8192), tmp_path_factory.mktemp("base"), vocab=64)


@pytest.fixture(scope="module")
def router(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """``serve run`` as a user starts it, on a Ray that it starts itself."""
    folder, port = tmp_path_factory.mktemp("ray"), free_port()
    settings = {**SMALL, "base": base, "store": folder / "store", "cache_tokens": 16384, "replicas": 2}
    config = {
        "http_options": {"port": port},
        "applications": [
            {
                "name": "deltaserve",
                "import_path": "deploy.ray_serve:app",
                "args": {name: str(value) for name, value in settings.items()},
            }
        ],
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    environment = {**ENVIRONMENT, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "/tmp", "RAY_DEDUP_LOGS": "0"}
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--app-dir", str(ROOT), str(folder / "serve.yaml")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        try:
            wait_until(lambda: process.poll() is not None or answers(http), 240)
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            yield http
        finally:
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)
            _, left = psutil.wait_procs([psutil.Process(process.pid), *children], 5)
            for one in left:  # how long Ray takes to end is not what is tested
                one.kill()


def answers(http: httpx.Client) -> bool:
    try:
        return http.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def ask(http: httpx.Client, model: str) -> httpx.Response:
    return http.post("/v1/completions", json={"model": model, "prompt": "sea", "max_tokens": 2})


def replicas_of(http: httpx.Client, model: str, at_once: int) -> set[str]:
    """Which replicas answer so many requests at once."""
    with ThreadPoolExecutor(at_once) as pool:
        responses = list(pool.map(lambda _: ask(http, model), range(at_once)))
    assert [response.text for response in responses if response.status_code != 200] == []
    return {response.headers["x-deltaserve-replica"] for response in responses}


def test_a_variant_stays_with_its_replica_and_uploads_reach_all(
    base: Path, router: httpx.Client, tmp_path: Path
) -> None:
    wait_until(lambda: len(replicas_of(router, base.name, 16)) == 2, 60)  # the base is everywhere
    for seed, name in enumerate(("first", "second")):
        sent = router.put(f"/v1/variants/{name}", content=artifact(base, tmp_path / name, seed=seed).read_bytes())
        assert sent.status_code in (200, 201), sent.text
        first = ask(router, name).headers["x-deltaserve-replica"]
        time.sleep(GOSSIP_SECONDS)
        assert {ask(router, name).headers["x-deltaserve-replica"] for _ in range(8)} == {first}
    for _ in range(8):  # whichever replica says it
        assert {"first", "second"} <= {model["id"] for model in router.get("/v1/models").json()["data"]}


def test_errors_are_the_servers_own(router: httpx.Client) -> None:
    response = ask(router, "nobody")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    broken = router.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert broken.status_code == 400
    assert broken.json()["error"]["type"] == "invalid_request_error"


def test_e_breaks_midstream_a_dying_replica_ends_the_stream_with_an_error_and_others_go_on(
    base: Path, router: httpx.Client
) -> None:
    """E-breaks-midstream"""
    wait_until(lambda: len(replicas_of(router, base.name, 16)) == 2, 60)
    events = []
    with router.stream("POST", "/v1/completions", json={"model": base.name, "prompt": "sea", **LONG}) as stream:
        replica = stream.headers["x-deltaserve-replica"]
        for line in stream.iter_lines():
            events += [line] if line else []
            if len(events) == 3:
                os.kill(int(replica.split()[1]), signal.SIGKILL)
    last = json.loads(events[-1].removeprefix("data: "))
    assert last["error"]["code"] == "replica_unavailable"
    assert all("error" not in json.loads(event.removeprefix("data: ")) for event in events[:-1])
    assert all(ask(router, base.name).status_code == 200 for _ in range(4))  # the other one, at once
    wait_until(lambda: len(replicas_of(router, base.name, 16) - {replica}) == 2, 300)  # and a new one
