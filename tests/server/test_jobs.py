"""Compression jobs over real HTTP: a checkpoint's files become a variant in a worker process."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from running_server import Running, running, wait_until
from tiny_models import fine_tuned, save, tiny_llama

from deltaserve.delta_store.codec.artifact import open_artifact

PATIENCE_SECONDS = 120
"""For a worker, which imports torch on a machine that may be busy with other tests."""

NARROW = {"method": "dense", "options": {"codec": "int4", "rank": 4}, "bytes": 100_000}
"""A search of few points."""

SENTENCES = ("the quick brown fox", "a lazy dog sleeps here")


@pytest.fixture(scope="module")
def fine(tmp_path_factory) -> Path:
    """A fine-tune in several shards, with text like what it will see, and no word of the base's files."""
    folder = save(fine_tuned(tiny_llama(), scale=0.01), tmp_path_factory.mktemp("fine"), "30KB")
    lines = [{"prompt": SENTENCES[i % 2], "answer": f"{SENTENCES[i % 2]} {i}"} for i in range(6)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "generation_config.json").unlink()
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def server(base, store, fine) -> Iterator[Running]:
    """Its workers may have so little memory that each is ended while it still imports torch."""
    with running(base, store, job_memory_bytes=1) as server:
        yield server


def send(server: Running, folder: Path) -> list[str]:
    """The ids of the folder's files, each sent by the openai client."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    return [client.files.create(file=path, purpose="fine-tune").id for path in sorted(folder.iterdir())]


def begin(server: Running, **body: object) -> str:
    answer = server.http.post("/v1/variants", json=NARROW | body)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def job(server: Running, job_id: str) -> dict:
    return server.http.get(f"/v1/jobs/{job_id}").json()


def ended(server: Running, job_id: str) -> dict:
    wait_until(lambda: job(server, job_id)["status"] not in ("queued", "running"), PATIENCE_SECONDS)
    return job(server, job_id)


def workers() -> list[int]:
    """The processes of this one's jobs."""
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_worker(pid)]


def _is_worker(pid: int) -> bool:
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return parent == os.getpid() and b"deltaserve.server.jobs.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, IndexError):
        return False


def test_a_job_goes_on_after_a_restart_and_its_artifact_is_served(base: Path, tmp_path: Path, fine: Path) -> None:
    with running(base, tmp_path, job_nice=0) as server:
        files = send(server, fine)
        job_id = begin(server, name="fine", file_ids=files)
        for file in files:
            server.http.delete(f"/v1/files/{file}")
        wait_until(lambda: job(server, job_id)["points"], PATIENCE_SECONDS)
    assert workers() == []
    measured = len((tmp_path / "jobs" / job_id / "artifact.search.jsonl").read_text().splitlines())
    with (
        running(base, tmp_path, job_nice=0) as server,
        server.http.stream("GET", f"/v1/jobs/{job_id}/events") as stream,
    ):
        states = [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line.startswith("data:")]
        assert states[0]["points"]
        assert [state["status"] for state in states[-2:]] == ["running", "succeeded"]
        assert all(state["points"] for state in states)
        progress = [state["progress"] for state in states[1:]]  # of this server's worker
        assert progress == sorted(progress)
        last = states[-1]
        assert (last["progress"], last["error"], last["variant"]) == (1, None, "fine")
        assert last["tolerance"] == {"bytes": 100_000}
        assert any(point["text"] == "held-out" and point["kl"] > 0 for point in last["points"])
        assert len(last["points"]) > measured - 2
        receipt = server.http.get("/v1/variants/fine").json()["current"]
        assert {**last["result"], "tier": receipt["tier"]} == receipt
        made = open_artifact(server.app.state.blobs.path(receipt["digest"]))
        assert last["quality"] == receipt["quality"] == made.manifest.quality
        assert made.manifest.provenance["options"] == NARROW["options"]
        asked = server.http.post("/v1/completions", json={"model": "fine", "prompt": [5], "max_tokens": 2})
        assert asked.headers["x-deltaserve-version"] == receipt["digest"]
        assert server.http.get("/v1/jobs").json()["data"] == [job(server, job_id)]
        late = server.http.post(f"/v1/jobs/{job_id}/cancel")
        assert (late.status_code, late.json()["error"]["code"]) == (409, "job_finished")
        assert server.files() == {f"blobs/{receipt['digest']}"} | profiles(server)


def profiles(server: Running) -> set[str]:
    return {name for name in server.files() if name.startswith("jobs/profile-")}


def test_a_worker_that_needs_too_much_memory_fails_its_job(server: Running, fine: Path) -> None:
    job_id = begin(server, name="v", file_ids=send(server, fine))
    failed = ended(server, job_id)
    assert (failed["status"], failed["result"]) == ("failed", None)
    assert failed["error"]["code"] == "job_failed"
    assert "it may have 1 bytes (DELTASERVE_JOB_MEMORY_BYTES)" in failed["error"]["message"]
    assert server.http.get("/v1/variants").json()["data"] == []
    assert not (server.store / "jobs" / job_id).exists()


def test_one_job_runs_at_a_time_and_a_cancelled_ones_worker_is_gone(base: Path, tmp_path: Path, fine: Path) -> None:
    with running(base, tmp_path, job_nice=0) as server:
        files = send(server, fine)
        first, second, third = (begin(server, name=name, file_ids=files) for name in "abc")
        wait_until(lambda: workers(), PATIENCE_SECONDS)
        (worker,) = workers()
        assert [job(server, one)["status"] for one in (first, second, third)] == ["running", "queued", "queued"]
        cancelled = server.http.post(f"/v1/jobs/{second}/cancel").json()
        assert (cancelled["status"], cancelled["finished_at"] is None) == ("cancelled", False)
        assert server.http.post(f"/v1/jobs/{first}/cancel").json()["status"] == "cancelled"
        wait_until(lambda: worker not in workers(), 5)
        wait_until(lambda: workers(), PATIENCE_SECONDS)
        os.kill(workers()[0], signal.SIGKILL)
        failed = ended(server, third)
        assert failed["error"]["message"] == "The worker was killed; most likely the machine ran out of memory"
        assert [job(server, one)["status"] for one in (first, second)] == ["cancelled", "cancelled"]
        assert server.http.post(f"/v1/jobs/{first}/cancel").status_code == 200
        assert list((tmp_path / "jobs").iterdir()) == []
        assert server.http.get("/v1/variants").json()["data"] == []


def test_a_checkpoint_of_another_shape_fails_and_says_why(base: Path, tmp_path: Path) -> None:
    other = save(tiny_llama(hidden=16), tmp_path / "other")
    with running(base, tmp_path / "store", job_nice=0) as server:
        failed = ended(server, begin(server, name="v", file_ids=send(server, other)))
    assert failed["status"] == "failed"
    assert (failed["error"]["type"], str(tmp_path) in failed["error"]["message"]) == ("invalid_request_error", False)
