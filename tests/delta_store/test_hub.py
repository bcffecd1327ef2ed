"""Checkpoints named ``org/name``: the real hub client against a hub's HTTP interface, served from a folder here."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import fine_tuned, save, tiny_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the repositories ``org/*`` that lie in a folder; ``asked`` are the files that were downloaded."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Repositories)
        self.folder = folder
        self.asked: list[str] = []


class Repositories(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _answer(self) -> None:
        match self.path.partition("?")[0].strip("/").split("/"):
            case ["api", "models", "org", name, "revision", "main"] if (self.server.folder / name).is_dir():
                siblings = [{"rfilename": file} for file in self._files(name)]
                self._send(json.dumps({"id": f"org/{name}", "sha": COMMIT, "siblings": siblings}).encode())
            case ["api", "models", "org", name, "tree", _]:
                tree = [{"type": "file", "path": file, "size": 0, "oid": COMMIT} for file in self._files(name)]
                self._send(json.dumps(tree).encode())
            case ["org", name, "resolve", _, file] if (path := self.server.folder / name / file).is_file():
                if self.command == "GET":
                    self.server.asked.append(f"{name}/{file}")
                self._send(path.read_bytes())
            case _:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

    def _files(self, name: str) -> list[str]:
        """And one that a repository holds for others."""
        return ["onnx/model.bin", *(path.name for path in (self.server.folder / name).iterdir())]

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json" if self.path.startswith("/api") else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "hub"
    save(tiny_llama(), folder / "base", vocab=64)
    save(fine_tuned(tiny_llama()), folder / "fine", vocab=64)
    old = save(tiny_llama(), folder / "old", vocab=64)
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    server = Hub(folder)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def compress(hub: Hub, home: Path, base: str, fine_tuned: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the client reads the hub's address when it is imported."""
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    environment = os.environ | own | settings
    words = ["compress", base, fine_tuned, "-o", str(home / "out.safetensors"), "--method", "dare", "--json"]
    command = [sys.executable, "-c", "from deltaserve.server.cli import main; main()", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_base_and_fine_tune_come_from_the_hub_once(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = compress(hub, home, "org/base", "org/fine")
    assert done.returncode == 0, done.stderr
    digest = json.loads(done.stdout)["digest"]
    assert {"base/model.safetensors", "fine/model.safetensors", "fine/config.json"} <= set(hub.asked)
    fetched = len(hub.asked)
    again = compress(hub, home, "org/base", "org/fine", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["digest"] == digest
    assert len(hub.asked) == fetched


def test_bin_files_are_fetched_where_there_are_no_safetensors(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = compress(hub, home, "org/old", str(hub.folder / "fine"))
    assert done.returncode == 0, done.stderr
    assert "old/pytorch_model.bin" in hub.asked
    assert not any("onnx" in file for file in hub.asked)


def test_a_repository_that_is_not_there_is_one_line(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = compress(hub, home, "org/base", "org/nothing")
    assert done.returncode == 1
    assert "'org/nothing' is no folder or file here, and the model hub did not give it" in done.stderr
    assert "Traceback" not in done.stderr
