"""Compression jobs over real HTTP: a checkpoint's files become a variant in a worker process."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from running_server import Running, running, wait_until
from safetensors.torch import save_file
from scripted_engine import ScriptedEngine
from scripted_service import serving
from tiny_models import fine_tuned, save, tiny_llama

from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.errors import DeltaServeError, ToleranceMissed, UploadError
from deltaserve.delta_store.selection.journal import read_points
from deltaserve.delta_store.selection.laboratory import BASE
from deltaserve.delta_store.shards import find_shards
from deltaserve.server.files.contents import write_index
from deltaserve.server.jobs import worker
from deltaserve.server.jobs.runner import MOST_STARTS, Runner, WorkerLimits
from deltaserve.server.jobs.store import JobStore, SearchOrder

PATIENCE_SECONDS = 240
"""For a worker, which imports torch on a machine that may be busy with other tests."""

OPTIONS = {"drop": 0.5, "codec": "int4", "block": 4, "rank": 4, "seed": 0}
OPTIONS |= {"embedding_codec": "int8", "whole_codec": "bf16"}
NARROW = {"method": "weighted", "options": OPTIONS, "bytes": 100_000}
"""A search of few points, whose artifact needs the base's activation profile."""

NO_LIMIT = {"max_kl": 9.0}
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
def server(base, tmp_path_factory) -> Iterator[Running]:
    """Its workers may have so little memory that each is ended while it still imports torch."""
    with running(base, tmp_path_factory.mktemp("store"), job_memory_bytes=1, job_nice=0) as server:
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
        server.app.state.runner.stop()  # at once: so small a search is soon over
    assert workers() == []
    journal = read_points(tmp_path / "jobs" / job_id / "artifact.search.jsonl")
    measured = [key for key, _ in journal if key != BASE]
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
        assert len(last["points"]) >= len(measured)
        assert last["points"][: len(states[0]["points"])] == states[0]["points"]
        receipt = server.http.get("/v1/variants/fine").json()["current"]
        assert {**last["result"], "tier": receipt["tier"]} == receipt
        made = open_artifact(server.app.state.blobs.path(receipt["digest"]))
        assert last["quality"] == receipt["quality"] == made.manifest.quality
        assert made.manifest.provenance["options"] == OPTIONS
        assert server.app.state.profiles.has(receipt["profile"])
        asked = server.http.post("/v1/completions", json={"model": "fine", "prompt": [5], "max_tokens": 2})
        assert asked.headers["x-deltaserve-version"] == receipt["digest"]
        assert server.http.get("/v1/jobs").json()["data"] == [job(server, job_id)]
        late = server.http.post(f"/v1/jobs/{job_id}/cancel")
        assert (late.status_code, late.json()["error"]["code"]) == (409, "job_finished")
        kept = f"jobs/profile-{receipt['base']}.safetensors"
        assert server.files() == {f"blobs/{receipt['digest']}", f"profiles/{receipt['profile']}", kept}


def test_a_worker_that_needs_too_much_memory_fails_its_job(server: Running, fine: Path) -> None:
    job_id = begin(server, name="v", file_ids=send(server, fine))
    failed = ended(server, job_id)
    assert (failed["status"], failed["result"]) == ("failed", None)
    assert failed["error"]["code"] == "job_failed"
    assert "it may have 1 bytes (DELTASERVE_JOB_MEMORY_BYTES)" in failed["error"]["message"]
    assert server.http.get(f"/v1/jobs/{job_id}/events").text == f"data: {json.dumps(failed, separators=(',', ':'))}\n\n"
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
        wait_until(lambda: not list((tmp_path / "jobs").iterdir()), 5)  # cleared up behind the word that it is over
        assert server.http.get("/v1/variants").json()["data"] == []


def test_what_is_wrong_with_a_checkpoint_is_said_without_the_servers_paths(base: Path, tmp_path: Path) -> None:
    save(tiny_llama(hidden=16), tmp_path / "checkpoint")
    order = {"base": str(base), "folder": str(tmp_path), "profile": "", "threads": 1, "search": {"tolerance": NO_LIMIT}}
    order["search"] |= {"method": None, "options": {}, "force": False}
    with pytest.raises(DeltaServeError) as refused:
        worker.made(order, lambda **said: None)
    error = worker.described(refused.value)
    assert (error["type"], error["code"]) == ("invalid_request_error", "unsupported_checkpoint")
    assert "hidden_size" in error["message"]
    assert str(tmp_path) not in error["message"]


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (MemoryError(), "job_failed", "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "job_failed", "out of memory"),
        (ToleranceMissed("Allow more, or write this one with --force"), "tolerance_missed", 'send "force": true'),
        (ZeroDivisionError("secret"), "internal_error", "its log says why"),
    ],
)
def test_how_a_worker_failed_is_said_in_the_apis_terms(failure: Exception, code: str, said: str) -> None:
    error = worker.described(failure)
    assert (error["code"], said in error["message"]) == (code, True)


def test_who_listens_to_a_job_reads_it_only_when_one_has_changed(base: Path, tmp_path: Path, monkeypatch) -> None:
    """Changes of another server on the same store are seen too."""
    asked = Counter()
    for name in ("revision", "get"):
        monkeypatch.setattr(JobStore, name, counted(getattr(JobStore, name), asked))
    monkeypatch.setattr("deltaserve.server.api.jobs.POLL_SECONDS", 0.005)
    with serving(tmp_path, ScriptedEngine()) as service, service.http() as http:
        service.app.state.runner.stop()
        jobs = service.app.state.jobs
        job_id = jobs.create("v", {"config.json": base / "config.json"}, None, SearchOrder(NO_LIMIT)).id
        with http.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
            events = (json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line)
            assert next(events)["status"] == "queued"
            asked.clear()
            wait_until(lambda: asked["revision"] > 20)
            assert asked["get"] == 0
            jobs.begin(job_id)
            assert next(events)["status"] == "running"
            jobs.report(job_id, "Search", 0.5, [])
            assert (event := next(events))["progress"] == 0.5, event
            other = JobStore(tmp_path / "jobs", tmp_path / "jobs.sqlite3")
            other.cancel(job_id)
            other.close()
            assert next(events)["status"] == "cancelled"
            assert list(events) == []


def counted(method: Callable[..., Any], asked: Counter[str]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        asked[method.__name__] += 1
        return method(*arguments)

    return call


def test_shards_without_an_index_get_one(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    write_index(tmp_path)
    assert [shard.path.name for shard in find_shards(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({"b": torch.ones(1)}, tmp_path / "model-3.safetensors")
    with pytest.raises(UploadError, match=r"'b' is in 'model-2.safetensors' and in 'model-3.safetensors'"):
        write_index(tmp_path)


def test_a_job_that_is_interrupted_again_and_again_fails(base: Path, tmp_path: Path) -> None:
    jobs = JobStore(tmp_path / "jobs", tmp_path / "jobs.sqlite3")
    job_id = jobs.create("v", {"config.json": base / "config.json"}, None, SearchOrder(NO_LIMIT)).id
    for _ in range(MOST_STARTS):
        assert jobs.begin(job_id)
    limits = WorkerLimits(2**40, 1, 0)
    runner = Runner(jobs, pytest.fail, base=str(base), profile=tmp_path / "profile", at_once=1, limits=limits)
    runner.start()
    wait_until(lambda: jobs.get(job_id).is_over)
    runner.stop()
    error = jobs.get(job_id).error
    assert error is not None
    assert error["message"] == f"The job was begun {MOST_STARTS} times and each time interrupted"
    jobs.close()
