"""The whole application over real HTTP on loopback, with an engine that says what it is told to."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI
from openai import OpenAI
from scripted_engine import Script, ScriptedEngine, ids

from deltaserve.delta_store.codec.artifact import write_artifact
from deltaserve.delta_store.registry import Receipt
from deltaserve.server.app import create_app
from deltaserve.server.settings import Settings


@dataclass(frozen=True)
class Service:
    """A running server: its application, its engine, and clients for it. The base is served as ``base``."""

    url: str
    app: FastAPI
    engine: ScriptedEngine

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30)

    def say(self, text: str | bytes, **script: object) -> None:
        """Answer every request with the tokens of ``text``."""
        tokens = ids(self.engine.tokenizer, text)
        self.engine.script = lambda *_: Script(tokens, **script)

    def register(self, name: str, files: dict[str, bytes] | None = None, base: str | None = None) -> str:
        """Add a variant whose artifact holds nothing but ``files``; returns its digest."""
        base = base or self.engine.fingerprint
        state = self.app.state
        with state.blobs.workspace() as folder:
            # The name is provenance, so that two variants never share a digest.
            digest = write_artifact(
                folder / "artifact", base=base, tied_head=True, parts=[], provenance={"name": name}, files=files
            )
            size = (folder / "artifact").stat().st_size
            with state.blobs.adopt(folder / "artifact", digest):
                state.registry.register(name, Receipt(digest, size, base, None, 0, 0))
        return digest

    def ended(self) -> dict[str, int]:
        """How many choices have ended in each way, as the metrics count them."""
        counts: Counter[str] = Counter()
        for metric in self.app.state.metrics.ended.collect():
            for sample in metric.samples:
                if sample.name.endswith("_total"):
                    counts[sample.labels["finished_reason"]] += int(sample.value)
        return dict(counts)

    def refused(self, code: str) -> int:
        """How many answers were an error with this code, as the metrics count them."""
        return int(self.app.state.metrics.refused.labels(code)._value.get())

    def wait_until(self, condition: object, seconds: float = 2.0) -> None:
        """Fail if ``condition()`` is not true in time."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "not in time"
            time.sleep(0.01)


@contextmanager
def serving(folder: Path, engine: ScriptedEngine, **settings: object) -> Iterator[Service]:
    """The application with ``engine``, on a free port of loopback."""
    app = create_app(Settings(base="base", store=folder, **settings), engine)
    server = uvicorn.Server(uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=1))
    listening = socket.create_server(("127.0.0.1", 0))
    # Small, so that a client who reads nothing is felt soon; the kernel's own would take megabytes of an answer.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        port = listening.getsockname()[1]
        yield Service(f"http://127.0.0.1:{port}", app, engine)
    finally:
        server.should_exit = True
        thread.join()
