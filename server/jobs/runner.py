"""Runs jobs: one worker process each, watched until it ends, its artifact then registered like any upload.

The worker's standard input stays open as long as it is wanted: the server dying ends it too.
"""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltaserve.delta_store.blobs import lock
from deltaserve.delta_store.errors import JobFailed
from deltaserve.server.api import errors
from deltaserve.server.jobs.store import REGISTER, Job, JobStore

POLL_SECONDS = 1.0
WATCH_SECONDS = 0.2
MOST_STARTS = 5
"""A job that was interrupted so often is likely to be what interrupts."""

WORKER = "deltaserve.server.jobs.worker"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Made:
    """What a worker wrote: an artifact, and the activation profile that it needs, if it needs one."""

    artifact: Path
    profile: str | None
    profile_file: Path


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What a worker may take; ``nice`` is how far it gives way to other processes, 0 to 19."""

    memory_bytes: int
    threads: int
    nice: int


class Runner:
    """``at_once`` threads that each run one job after the other, from ``start`` to ``stop``.

    ``finish`` registers what was made and returns the version's receipt. ``base`` and ``fingerprint`` are the served
    checkpoint's.
    """

    def __init__(
        self,
        jobs: JobStore,
        finish: Callable[[Job, Made], dict[str, Any]],
        *,
        base: str,
        profile: Path,
        at_once: int,
        limits: WorkerLimits,
    ) -> None:
        self._jobs, self._finish = jobs, finish
        self._base, self._profile = base, profile
        self._limits = limits
        self._stopping, self._woken = threading.Event(), threading.Event()
        self._runners = [threading.Thread(target=self._work, name=f"job-{i}", daemon=True) for i in range(at_once)]

    def start(self) -> None:
        """Begin to run jobs, those first that an earlier server left."""
        for runner in self._runners:
            runner.start()

    def wake(self) -> None:
        """There is a new job."""
        self._woken.set()

    def stop(self) -> None:
        """End the workers. Their jobs go on at the next start."""
        self._stopping.set()
        self._woken.set()
        for runner in self._runners:
            if runner.is_alive():
                runner.join()

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                ran = self._run_next()
            except Exception:
                log.exception("A job could not be run")
                ran = False
            if not ran:
                self._woken.wait(POLL_SECONDS)
                self._woken.clear()

    def _run_next(self) -> bool:
        """Run the oldest job that nobody runs; False if there is none."""
        for job in self._jobs.waiting():
            with lock(self._jobs.folder(job.id), fcntl.LOCK_EX | fcntl.LOCK_NB) as ours:
                if ours and self._jobs.begin(job.id):
                    self._run(self._jobs.get(job.id))
                    return True
        return False

    def _run(self, job: Job) -> None:
        if job.starts > MOST_STARTS:
            self._fail(job, JobFailed(f"The job was begun {MOST_STARTS} times and each time interrupted"))
            return
        last = self._watch(job)
        if self._stopping.is_set() and "artifact" not in last:
            return
        if self._jobs.get(job.id).status == "cancelled":
            self._jobs.clear(job.id)
        elif "error" in last:
            self._jobs.fail(job.id, last["error"])
        elif "artifact" in last and self._jobs.report(job.id, REGISTER, 1.0, None):
            self._register(job, Made(Path(last["artifact"]), last["profile"], self._profile))
        elif "artifact" not in last:
            self._fail(job, JobFailed(_how_it_ended(last["status"])))

    def _watch(self, job: Job) -> dict[str, Any]:
        """Run the worker to its end; returns the last thing that it said, and its exit ``status``."""
        said: dict[str, Any] = {}

        def listen() -> None:
            for line in process.stdout or ():
                said.update(json.loads(line))
                if "stage" in said:
                    self._jobs.report(job.id, said["stage"], said["progress"], said["points"])

        environment = {**os.environ, "OMP_NUM_THREADS": str(self._limits.threads)}
        with subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        ) as process:
            listener = threading.Thread(target=listen)
            listener.start()
            self._order(process, job)
            while process.poll() is None:
                if self._stopping.is_set() or self._jobs.get(job.id).status != "running":
                    process.kill()
                self._stopping.wait(WATCH_SECONDS)
            listener.join()
        return {**said, "status": process.returncode}

    def _order(self, process: "subprocess.Popen[str]", job: Job) -> None:
        order = {
            "base": self._base,
            "folder": str(self._jobs.folder(job.id)),
            "profile": str(self._profile),
            "search": asdict(job.search),
            **asdict(self._limits),
        }
        if process.stdin:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()

    def _register(self, job: Job, made: Made) -> None:
        try:
            result = self._finish(job, made)
        except Exception as error:
            self._fail(job, error)
        else:
            self._jobs.succeed(job.id, result)

    def _fail(self, job: Job, error: Exception) -> None:
        self._jobs.fail(job.id, errors.described(error)[1]["error"])


def _how_it_ended(status: int) -> str:
    if status == -signal.SIGKILL:
        return "The worker was killed; most likely the machine ran out of memory"
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return f"The worker ended with {how}; the server's log says why"
