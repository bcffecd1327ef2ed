"""``deltaserve push`` of a whole checkpoint: its files are sent in parts, and the server compresses it in a job."""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from deltaserve.delta_store.errors import DeltaServeError, OptionError
from deltaserve.server.client import answer

if TYPE_CHECKING:
    import httpx

PART_BYTES = 16 * 2**20
PAUSES_SECONDS = (1, 3)
"""Before a part is sent again, whose connection broke; then it counts as lost."""

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


def send_files(client: "httpx.Client", progress: Progress, files: Sequence[Path]) -> list[str]:
    """The ids of these files on the server; what it has already is not sent again."""
    from deltaserve.delta_store.blobs import digest_of

    ids = []
    for file in files:
        task = progress.add_task(file.name, total=file.stat().st_size)
        there = answer(client.get("/v1/files", params={"sha256": digest_of(file)}))["data"]
        known = next((one["id"] for one in there if one["filename"] == file.name), None)
        ids.append(known or _send_in_parts(client, progress, task, file))
        progress.update(task, completed=file.stat().st_size)
    return ids


def _send_in_parts(client: "httpx.Client", progress: Progress, task: Any, file: Path) -> str:
    head = {"filename": file.name, "bytes": file.stat().st_size, "mime_type": "application/octet-stream"}
    upload = answer(client.post("/v1/uploads", json={**head, "purpose": "fine-tune"}))["id"]
    check, parts = hashlib.md5(usedforsecurity=False), []
    for piece in _pieces(file):
        check.update(piece)
        parts.append(_send_part(client, upload, piece))
        progress.advance(task, len(piece))
    done = {"part_ids": parts, "md5": check.hexdigest()}
    file_id: str = answer(client.post(f"/v1/uploads/{upload}/complete", json=done))["file"]["id"]
    return file_id


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while piece := opened.read(PART_BYTES):
            yield piece


def _send_part(client: "httpx.Client", upload: str, piece: bytes) -> str:
    """Send a part, again where the connection breaks; returns its id."""
    import httpx

    def send() -> str:
        part: str = answer(client.post(f"/v1/uploads/{upload}/parts", files={"data": piece}))["id"]
        return part

    for pause in PAUSES_SECONDS:
        with suppress(httpx.TransportError):
            return send()
        time.sleep(pause)
    return send()


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
