"""The process that one job runs in: ``python -m deltaserve.server.jobs.worker``.

Its order is a line of JSON on standard input, which then stays open: its end is this process's end. It says how far it
is in lines of JSON on standard output. It gives way to other processes, and is the first that a machine short of
memory ends.
"""

import json
import os
import select as waiting
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

from deltaserve.delta_store.errors import JobFailed, ToleranceMissed

STAGES: Mapping[str, tuple[float, float, int]] = {
    # stage of the search: where the bar is when it begins and when it ends, and how many steps it often takes
    "Profile of the base": (0.02, 0.1, 1),
    "Survey": (0.1, 0.45, 26),
    "Contest": (0.45, 0.6, 12),
    "Refine": (0.6, 0.9, 20),
    "Confirm": (0.9, 0.94, 3),
    "Report": (0.94, 0.99, 7),
}
REPORT_SECONDS = 0.1
WATCH_SECONDS = 0.1
ARTIFACT = "artifact"


def main() -> None:
    """Do what standard input says."""
    say = _Voice()
    order = json.loads(sys.stdin.readline())
    _give_way(order["nice"])
    threading.Thread(target=_watch, args=(order["memory_bytes"], say), daemon=True).start()
    try:
        say(**made(order, say))
    except Exception as error:
        say(error=described(error))
        sys.exit(1)


Say = Callable[..., None]
"""Called with what is to be said, by name."""


class _Voice:
    """Lines on what was standard output; whatever else is printed goes to standard error."""

    def __init__(self) -> None:
        self._descriptor = os.dup(1)
        os.dup2(2, 1)

    def __call__(self, **said: Any) -> None:
        os.write(self._descriptor, (json.dumps(said) + "\n").encode())


def made(order: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Search the artifact; returns where it is and the digest of the profile that it needs."""
    say(stage="Check", progress=0.0, points=None)
    import torch

    from deltaserve.delta_store.selection.select import select
    from deltaserve.delta_store.selection.texts import Files
    from deltaserve.server.examination import told_of_the_upload
    from deltaserve.server.files.contents import write_index
    from deltaserve.server.jobs.store import CHECKPOINT, TEXT

    torch.set_num_threads(order["threads"])
    folder, search = Path(order["folder"]), order["search"]
    out, text = folder / ARTIFACT, folder / TEXT
    with told_of_the_upload(folder / CHECKPOINT):
        write_index(folder / CHECKPOINT)
        found = select(
            order["base"],
            folder / CHECKPOINT,
            out,
            _tolerance(search["tolerance"]),
            method=search["method"],
            options=search["options"],
            files=Files(text if text.exists() else None, None),
            profile=Path(order["profile"]),
            draws=False,  # whoever looks at the job has its points
            force=search["force"],
            progress=_Progress(out, say),
        )
    return {"artifact": str(out), "profile": found.receipt.profile}


class _Progress:
    """Told by the search how far it is; tells the server, not too often."""

    def __init__(self, out: Path, say: Say) -> None:
        self._journal, self._say = out.with_name(f"{out.name}.search.jsonl"), say
        self._stage, self._said_at = "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == self._stage and monotonic() - self._said_at < REPORT_SECONDS:
            return
        begin, end, steps = STAGES.get(stage, (0.0, 0.0, 1))
        share = done / max(total, 1) if steps == 1 else min(done / steps, 1.0)
        self._say(stage=stage, progress=begin + (end - begin) * share, points=_points(self._journal))
        self._stage, self._said_at = stage, monotonic()


def _points(journal: Path) -> Sequence[Mapping[str, Any]]:
    from deltaserve.delta_store.selection.candidate import Candidate
    from deltaserve.delta_store.selection.journal import read_points
    from deltaserve.delta_store.selection.laboratory import BASE

    return [
        {
            "bytes": point.bytes,
            "kl": point.kl,
            "agreement": point.agreement,
            "setting": Candidate.from_key(key).label,
            "text": text,
        }
        for (key, text), point in read_points(journal).items()
        if key != BASE
    ]


def _tolerance(given: Mapping[str, Any]) -> Any:
    from deltaserve.delta_store.selection.tolerance import Tolerance

    ((kind, value),) = given.items()
    if isinstance(value, str):
        return Tolerance(kind, float(value.removesuffix("%")) / 100, relative=True)
    return Tolerance(kind, value)


def described(error: Exception) -> dict[str, Any]:
    """OpenAI's error object."""
    from deltaserve.server.api import errors

    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        error = JobFailed("The worker ran out of memory: the machine has no more")
    if isinstance(error, ToleranceMissed):
        error = ToleranceMissed(str(error).replace("write this one with --force", 'send "force": true'))
    described: dict[str, Any] = errors.described(error)[1]["error"]
    return described


def _give_way(nice: int) -> None:
    os.nice(nice)
    with suppress(OSError):  # Linux: whom the kernel ends first when memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000")


def _watch(memory_bytes: int, say: Say) -> None:
    """End this process when the server has gone, or when it takes more memory than it may."""
    while True:
        if waiting.select([sys.stdin], [], [], WATCH_SECONDS)[0]:
            os._exit(1)  # nothing is ever sent after the order: this is the end of the pipe
        if (used := _memory()) > memory_bytes:
            limit = f"{memory_bytes:,} bytes (DELTASERVE_JOB_MEMORY_BYTES)"
            say(error=described(JobFailed(f"The worker needed {used:,} bytes of memory, it may have {limit}")))
            os._exit(1)


def _memory() -> int:
    """Bytes that this process holds itself: mapped files, which can be dropped at any time, do not count."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


if __name__ == "__main__":
    main()
