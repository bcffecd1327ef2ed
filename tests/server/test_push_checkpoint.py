"""``deltaserve push`` of a checkpoint's folder: sent in parts once, compressed by the server, followed to the end."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_server import Running, artifact, running
from tiny_models import fine_tuned, save, tiny_llama

from deltaserve.server.commands import push_checkpoint, push_parts

SEARCH = ("--method", "lossless", "--bytes", 1_000_000)
"""Of few points."""


@pytest.fixture(scope="module")
def fine(tmp_path_factory) -> Path:
    return save(fine_tuned(tiny_llama(), scale=0.01), tmp_path_factory.mktemp("fine"), "30KB", vocab=64)


@pytest.fixture(scope="module")
def server(base, tmp_path_factory) -> Iterator[Running]:
    with running(base, tmp_path_factory.mktemp("store"), job_nice=0, upload_idle_seconds=120.0) as server:
        yield server


def files_of(server: Running) -> dict[str, str]:
    return {file["filename"]: file["sha256"] for file in server.http.get("/v1/files").json()["data"]}


def test_a_folder_becomes_a_variant_and_is_not_sent_twice(deltaserve, server, fine, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(push_parts, "PART_BYTES", 10_000)
    lines = [{"prompt": f"say {i}", "answer": f"it is {i}"} for i in range(6)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("push", fine, "--name", "team/fine", "--url", server.url, "--calibration", tmp_path / "text.jsonl")
    code, out, err = deltaserve(*command, *SEARCH)
    assert (code, out.startswith("team/fine: version 1, ")) == (0, True), err
    shards = {path.name for path in fine.glob("*.safetensors")}
    assert len(shards) > 1
    assert shards | {"config.json", "model.safetensors.index.json", "text.jsonl"} <= files_of(server).keys()
    quality = server.http.get("/v1/variants/team/fine").json()["current"]["quality"]
    assert quality["kl_mean"] == pytest.approx(0, abs=1e-5)
    monkeypatch.setattr(push_parts, "_send_part", None)
    monkeypatch.setattr(push_checkpoint, "follow", lambda *_: pytest.fail("nothing to follow"))
    code, _, err = deltaserve(*command[:-2], "--bytes", 1)
    assert (code, "'bytes' must be" in err) == (1, True), (
        "all files were there, so this is what the job was refused for"
    )


def test_an_artifact_that_is_there_is_not_sent_again(deltaserve, server, base, tmp_path, monkeypatch) -> None:
    file = artifact(base, tmp_path / "v.safetensors")
    assert deltaserve("push", file, "--name", "v", "--url", server.url)[0] == 0
    monkeypatch.setattr("deltaserve.server.commands.push._send", None)
    code, out, err = deltaserve("push", file, "--name", "w", "--url", server.url)
    assert (code, out.startswith("w: version 1, ")) == (0, True), err


def test_what_is_no_checkpoint_to_send_is_refused_here(deltaserve, server, base, tmp_path) -> None:
    file = artifact(base, tmp_path / "v.safetensors")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ((file, "--max-kl", "2%"), "no folder of a checkpoint"),
        ((base, "--max-kl", "two"), "--max-kl is 'two'"),
        ((base, "--calibration", file), "no .jsonl file"),
        ((tmp_path / "old",), "holds pickles"),
        ((tmp_path / "empty",), "holds neither model.safetensors nor"),
    ):
        code, out, err = deltaserve("push", *arguments, "--name", "x", "--url", server.url)
        assert (code, out, said in err) == (1, "", True), err
