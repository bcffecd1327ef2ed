"""``deltaserve push`` of a whole checkpoint: which files it is, and the job in which the server compresses it."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from deltaserve.delta_store.errors import DeltaServeError, OptionError
from deltaserve.server.client import answer

if TYPE_CHECKING:
    import httpx

POLL_SECONDS = 0.5


def checkpoint_files(folder: Path, text: Path | None) -> list[Path]:
    """The files of a checkpoint that the server needs. Raises CheckpointError, OptionError where there are none."""
    from deltaserve.delta_store.shards import SAFETENSORS, find_shards
    from deltaserve.delta_store.variant_files import VARIANT_FILES

    shards = [shard.path for shard in find_shards(folder)]
    if any(path.suffix != ".safetensors" for path in shards):
        raise OptionError(f"{folder} holds pickles (.bin), which a server does not take; save it as safetensors")
    beside = [folder / name for name in (f"{SAFETENSORS}.index.json", "config.json", *VARIANT_FILES)]
    if text is not None and (text.suffix != ".jsonl" or not text.is_file()):
        raise OptionError(f"{text} is no .jsonl file of conversations to measure on")
    return [*shards, *(path for path in beside if path.is_file()), *([text] if text else [])]


def follow(client: "httpx.Client", job_id: str) -> Mapping[str, Any]:
    """Show how far a job is until it is over; returns the receipt of its version. Raises what it failed of."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("Waiting", total=1.0)
        try:
            while True:
                job = answer(client.get(f"/v1/jobs/{job_id}"))
                tried = f", {len(job['points'])} points" if job["points"] else ""
                progress.update(task, description=f"{job['stage'] or 'Waiting'}{tried}", completed=job["progress"])
                if job["finished_at"] is not None:
                    break
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            raise DeltaServeError(f"The job {job_id} goes on; POST /v1/jobs/{job_id}/cancel ends it") from None
    if job["status"] != "succeeded":
        reason = job["error"]["message"] if job["error"] else "it was cancelled"
        raise DeltaServeError(f"The job {job_id} {job['status']}: {reason}")
    receipt: Mapping[str, Any] = job["result"]
    return receipt


def search_of(max_kl: str | None, min_agreement: float | None, size: int | None, method: str | None) -> dict[str, Any]:
    """The fields of the request that say what to look for: those that were given."""
    given = {"max_kl": _kl(max_kl), "min_agreement": min_agreement, "bytes": size, "method": method}
    return {name: value for name, value in given.items() if value is not None}


def _kl(text: str | None) -> float | str | None:
    if text is None or text.endswith("%"):
        return text
    try:
        return float(text)
    except ValueError as error:
        raise OptionError(f"--max-kl is {text!r}; give nats (0.004), or a share of the base's KL (2%)") from error
