"""A server with many variants: the demo's artifacts under as many names as are wanted, each a version of its own.

Their deltas repeat, but nothing is shared: every copy has another digest, and so a file, a load and a place in memory.
"""

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil

from deltaserve.delta_store.blobs import BlobStore, digest_of
from deltaserve.delta_store.registry.sqlite import SqliteRegistry

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "deploy" / "demo"
ARTIFACTS = sorted((DEMO / "variants").glob("*.safetensors"))
PATIENCE_S = 600


@dataclass(frozen=True, slots=True)
class Served:
    """A server's address and its process."""

    url: str
    process: "subprocess.Popen[bytes]"
    store: Path | None = None

    def stop(self) -> None:
        """End it, and those of its processes that it leaves behind."""
        processes = self.processes() if self.process.poll() is None else []
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self) -> list[psutil.Process]:
        """The server's own and those that it started."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]


def copy_of(artifact: Path, number: int) -> bytes:
    """The artifact with its number in its provenance: the same deltas under another digest."""
    content = artifact.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["deltaserve"])
    manifest["provenance"]["copy"] = number
    header["__metadata__"]["deltaserve"] = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def names(count: int) -> list[str]:
    return [f"variant-{number}" for number in range(count)]


def upload(url: str, count: int) -> None:
    """Register ``count`` variants over HTTP, the way any client would."""
    profile = str(DEMO / "profile.safetensors")
    push = [sys.executable, "-m", "deltaserve.server.cli", "push", str(ARTIFACTS[0]), "--name", "profile-bringer"]
    subprocess.run([*push, "--url", url, "--profile", profile], check=True, stdout=subprocess.DEVNULL)
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        client.delete("/v1/variants/profile-bringer").raise_for_status()
        for number, name in enumerate(names(count)):
            body = copy_of(ARTIFACTS[number % len(ARTIFACTS)], number)
            client.put(f"/v1/variants/{name}", content=body).raise_for_status()


def register_copies(served: Served, count: int) -> None:
    """The same in seconds for a thousand: one upload of each artifact is examined, its copies go into the store.

    As a second server on the same store would bring them in; each is still checked when it is loaded.
    """
    assert served.store is not None
    upload(served.url, min(count, len(ARTIFACTS)))
    registry, blobs = SqliteRegistry(served.store / "registry.sqlite3"), BlobStore(served.store / "blobs")
    receipts = [registry.current(name).receipt for name in names(count)[: len(ARTIFACTS)]]
    for number, name in list(enumerate(names(count)))[len(ARTIFACTS) :]:
        with blobs.workspace() as folder:
            file = folder / "artifact"
            file.write_bytes(copy_of(ARTIFACTS[number % len(ARTIFACTS)], number))
            receipt = replace(receipts[number % len(ARTIFACTS)], digest=digest_of(file), size_bytes=file.stat().st_size)
            with blobs.adopt(file, receipt.digest):
                registry.register(name, receipt)
    registry.close()


@contextmanager
def deltaserve(base: Path, name: str, options: Sequence[str] = ()) -> Iterator[Served]:
    """A server of its own on a fresh store, which serves the base as ``name``."""
    with tempfile.TemporaryDirectory() as store:
        flags = ["--served-name", name, "--store", store, "--log-level", "warning", *options]
        command = [sys.executable, "-m", "deltaserve.server.cli", "serve", str(base), *flags]
        with started(command, "/ready") as served:
            yield replace(served, store=Path(store))


@contextmanager
def started(command: Sequence[str], ready: str, environment: dict[str, str] | None = None) -> Iterator[Served]:
    """A server's process, on a free port and ready; it ends with the block."""
    port = free_port()
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
        stdout=subprocess.DEVNULL,
    )
    served = Served(f"http://127.0.0.1:{port}", process)
    try:
        wait_until_ready(served.url + ready, process)
        yield served
    finally:
        served.stop()


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + PATIENCE_S
    with httpx.Client() as client:  # a new one for each try takes longer than the try
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise SystemExit(f"The server ended with code {process.returncode}; its message is above.")
            try:
                if client.get(url).is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
    raise SystemExit(f"{url} did not answer within {PATIENCE_S} s.")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
