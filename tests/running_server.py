"""Real servers on loopback with tiny real models: in a thread of the test, or a process of ``deltaserve serve``."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
import uvicorn
from fastapi import FastAPI
from torch import Tensor

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import write_artifact
from deltaserve.delta_store.codec.specs import DenseSpec
from deltaserve.delta_store.fingerprint import fingerprint
from deltaserve.kernels.codes import float_codes
from deltaserve.kernels.parts import Dense
from deltaserve.server.app import create_app
from deltaserve.server.settings import Settings

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SMALL = {"cache_tokens": 2048, "threads": 1, "log_level": "warning"}


@dataclass(frozen=True)
class Running:
    url: str
    app: FastAPI
    http: httpx.Client

    @property
    def store(self) -> Path:
        return self.app.state.settings.folder

    def files(self) -> set[str]:
        """Every file of the store but the databases, relative to it."""
        return {
            str(path.relative_to(self.store))
            for path in self.store.rglob("*")
            if path.is_file() and ".sqlite3" not in path.name
        }


@contextmanager
def running(base: Path, store: Path, **settings: object) -> Iterator[Running]:
    """A server in a thread of this process."""
    app = create_app(Settings(base=str(base), store=store, **(SMALL | settings)))
    config = uvicorn.Config(app, port=0, http="h11", log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), 60)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=30) as http:
            yield Running(url, app, http)
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def serving(base: Path, store: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``deltaserve serve`` in a process of its own: its address and the process."""
    command = [sys.executable, "-m", "deltaserve.server.cli", "serve", str(base), "--store", str(store), "--port", "0"]
    flags = (*flags, *(text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))))
    with subprocess.Popen([*command, *flags], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("curl http://"), f"the server did not start: {line!r}"
            yield line.split()[1].removesuffix("/v1/chat/completions"), process
        finally:
            process.terminate()


def artifact(folder: Path, path: Path, names: list[str] | None = None, seed: int = 0, **more) -> Path:
    """An artifact that adds noise to the tensors ``names`` of the base in ``folder``, by default to one."""
    checkpoint = open_checkpoint(folder)
    generator = torch.Generator().manual_seed(seed)
    parts = (
        dense_part(name, 0.1 * torch.randn(checkpoint.shape(name), generator=generator))
        for name in names or ["model.layers.0.mlp.down_proj.weight"]
    )
    write_artifact(path, **{"base": fingerprint(checkpoint), "tied_head": True, "parts": parts} | more)
    return path


def dense_part(name: str, delta: Tensor) -> tuple[str, DenseSpec, Dense]:
    """A part that holds ``delta`` in float32."""
    shape = tuple(delta.shape)
    return name, DenseSpec(shape=shape, codec="float32", group=1), Dense(shape, float_codes(delta, "float32"))


def wait_until(condition, seconds: float = 5.0) -> None:
    """Fail if ``condition()`` is not true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)
