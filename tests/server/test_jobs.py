"""Compression jobs over real HTTP: a checkpoint's files become a variant in a worker process."""

import json
from pathlib import Path

import pytest
from openai import OpenAI
from running_server import Running, wait_until
from tiny_models import fine_tuned, save, tiny_llama

SENTENCES = ("the quick brown fox", "a lazy dog sleeps here", "seven words make up this small line", "go on then")


@pytest.fixture(scope="module")
def fine(tmp_path_factory) -> Path:
    """A fine-tune in two shards, with text like what it will see."""
    folder = save(fine_tuned(tiny_llama(), scale=0.01), tmp_path_factory.mktemp("fine"), "60KB", vocab=64)
    lines = [{"prompt": SENTENCES[i % 4], "answer": f"{SENTENCES[i % 3]} {i}"} for i in range(18)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def sent(server: Running, folder: Path, *names: str) -> list[str]:
    """The ids of the folder's files, or of some, each sent through the openai client."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    paths = [folder / name for name in names] or sorted(folder.iterdir())
    return [client.files.create(file=path, purpose="fine-tune").id for path in paths]


def begin(server: Running, **body: object) -> dict:
    answer = server.http.post("/v1/variants", json=body)
    assert answer.status_code == 202, answer.text
    return answer.json()


def job(server: Running, job_id: str) -> dict:
    return server.http.get(f"/v1/jobs/{job_id}").json()


def test_a_checkpoint_becomes_a_variant(server: Running, fine: Path) -> None:
    begun = begin(server, name="fine", file_ids=sent(server, fine), max_kl="30%")
    assert begun["status"] == "queued"
    print(begun)
    wait_until(lambda: job(server, begun["id"])["status"] not in ("queued", "running"), 120)
    print(json.dumps(job(server, begun["id"]), indent=1))
