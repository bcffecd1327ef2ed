"""A push that was cut off sends the rest: whoever is killed, and whatever breaks on the way."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from running_server import ENVIRONMENT, Running, artifact
from tiny_models import tiny_llama

from deltaserve.delta_store.errors import UploadNotFound
from deltaserve.server.commands import push_parts
from deltaserve.server.files.uploads import Part, Uploads

PART = 2000
PUSH = f"""from deltaserve.server import cli
from deltaserve.server.commands import push_parts
push_parts.PART_BYTES = {PART}
cli.main()"""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_parts, "PART_BYTES", PART)
    monkeypatch.setattr(push_parts, "PAUSES_SECONDS", (0, 0))


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each part that the server was sent."""
    sizes: list[int] = []
    add_part = Uploads.add_part

    def counted(self: Uploads, upload_id: str, received: Path, size_bytes: int, sha256: str) -> Part:
        sizes.append(size_bytes)
        return add_part(self, upload_id, received, size_bytes, sha256)

    monkeypatch.setattr(Uploads, "add_part", counted)
    return sizes


@pytest.fixture
def file(base: Path, tmp_path: Path) -> Path:
    """An artifact of some parts, another one in each test."""
    seed = int.from_bytes(os.urandom(3))
    return artifact(base, tmp_path / "file.safetensors", seed=seed)


def pending(server: Running) -> list[dict]:
    return server.http.get("/v1/uploads").raise_for_status().json()["data"]


def test_after_a_killed_push_only_the_rest_is_sent(deltaserve, server, file, received, monkeypatch) -> None:
    counted = Uploads.add_part
    push = ("push", str(file), "--name", "killed", "--url", server.url)
    with subprocess.Popen([sys.executable, "-c", PUSH, *push], env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:

        def kill(self: Uploads, *arguments: object) -> Part:
            part = counted(self, *arguments)
            if len(received) == 3:
                process.kill()
                process.wait()
            return part

        monkeypatch.setattr(Uploads, "add_part", kill)
        assert process.wait(60) == -signal.SIGKILL
    monkeypatch.setattr(Uploads, "add_part", counted)
    size = file.stat().st_size
    assert received == [PART] * 3
    (upload,) = pending(server)
    assert [part["bytes"] for part in upload["parts"]] == [PART] * 3
    assert server.http.get("/v1/variants/killed").status_code == 404
    received.clear()
    code, out, err = deltaserve(*push)
    assert (code, out.startswith("killed: version 1, ")) == (0, True), err
    assert sum(received) == size - 3 * PART, "the second time only the rest is sent"
    assert "file.safetensors (goes on)" in err
    assert "100%" in err or "kB" in err
    assert pending(server) == []
    received.clear()
    assert deltaserve("push", file, "--name", "again", "--url", server.url)[0] == 0
    assert received == [], "what is there whole is not sent again"


def test_a_broken_connection_says_what_is_there_and_how_to_go_on(deltaserve, server, file, received, monkeypatch):
    post = httpx.Client.post

    def cut(client: httpx.Client, path: str, **more: object) -> httpx.Response:
        if path.endswith("/parts") and len(received) == 2:
            raise httpx.WriteError("Broken pipe")
        return post(client, path, **more)

    monkeypatch.setattr(httpx.Client, "post", cut)
    push = ("push", file, "--name", "broken", "--url", server.url)
    code, out, err = deltaserve(*push)
    size = file.stat().st_size
    assert (code, out) == (1, "")
    assert (
        f"Error: The connection broke (Broken pipe): 4.0 kB of {size / 1000:.1f} kB are on the server; call it" in err
    )
    monkeypatch.setattr(httpx.Client, "post", post)
    assert deltaserve(*push)[0] == 0
    assert sum(received) == size


def test_a_connection_that_breaks_once_does_not_end_a_push(deltaserve, server, file, received, monkeypatch) -> None:
    post, broken = httpx.Client.post, []

    def cut(client: httpx.Client, path: str, **more: object) -> httpx.Response:
        if path.endswith("/parts") and len(received) == 2 and not broken:
            broken.append(path)
            raise httpx.WriteError("Broken pipe")
        return post(client, path, **more)

    monkeypatch.setattr(httpx.Client, "post", cut)
    code, _, err = deltaserve("push", file, "--name", "once", "--url", server.url)
    assert (code, len(broken), sum(received)) == (0, 1, file.stat().st_size), err


def test_an_interrupt_says_how_to_go_on(deltaserve, server, file, received, monkeypatch) -> None:
    post = httpx.Client.post

    def interrupt(client: httpx.Client, path: str, **more: object) -> httpx.Response:
        if path.endswith("/parts") and received:
            raise KeyboardInterrupt
        return post(client, path, **more)

    monkeypatch.setattr(httpx.Client, "post", interrupt)
    code, out, err = deltaserve("push", file, "--name", "stopped", "--url", server.url)
    assert (code, out) == (1, "")
    assert "Error: Interrupted: 2.0 kB of " in err


def test_one_request_is_enough_where_parts_come_to_several_replicas(deltaserve, server, file, monkeypatch) -> None:
    def elsewhere(self: Uploads, *_: object) -> None:
        raise UploadNotFound("There is no upload of this id here")

    monkeypatch.setattr(Uploads, "check_room", elsewhere)
    code, out, err = deltaserve("push", file, "--name", "balanced", "--url", server.url)
    assert (code, out.startswith("balanced: version 1, ")) == (0, True), err
    folder = file.parent / "checkpoint"
    tiny_llama().save_pretrained(folder)
    code, _, err = deltaserve("push", folder, "--name", "whole", "--url", server.url)
    assert (code, "give the address of one replica with --url" in err) == (1, True), err


def test_a_large_adapter_comes_in_parts_too(deltaserve, server, tmp_path, received) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora")
    code, out, err = deltaserve("push", tmp_path / "lora", "--name", "lora", "--url", server.url)
    assert (code, out.startswith("lora: version 1, ")) == (0, True), err
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert sum(received) == sum((tmp_path / "lora" / name).stat().st_size for name in names)


def test_what_cannot_be_named_so_is_said_before_anything_is_sent(deltaserve, server, file, received) -> None:
    code, _, err = deltaserve("push", file, "--name", "no good", "--url", server.url)
    assert (code, "'no good'" in err, received) == (1, True, [])


def test_what_was_sent_is_kept_for_some_days_only(server, file, deltaserve) -> None:
    assert deltaserve("push", file, "--name", "kept", "--url", server.url)[0] == 0
    for one in server.http.get("/v1/files").json()["data"]:
        assert one["expires_at"] - one["created_at"] == push_parts.KEPT_SECONDS
