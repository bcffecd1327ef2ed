"""Files on their way to a server in parts: a push that was cut off goes on with the parts that are not there yet."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from rich.filesize import decimal
from rich.progress import Progress, TaskID

from deltaserve.delta_store.errors import DeltaServeError
from deltaserve.server.client import Refusal, answer

PART_BYTES = 8 * 2**20
KEPT_SECONDS = 7 * 86400
"""How long the server keeps what was sent, so that it need not be sent again; what is made of it stays."""

PAUSES_SECONDS = (1, 3)
"""Before a part is sent again, whose connection broke; then it counts as lost."""


class SeveralReplicas(DeltaServeError):
    """The parts of a file came to servers that do not know of each other's."""


def is_large(files: Sequence[Path]) -> bool:
    """Whether it pays to send them in parts: only from two parts on can a push go on where it was cut off."""
    return sum(file.stat().st_size for file in files) > PART_BYTES


def send_files(client: httpx.Client, progress: Progress, files: Sequence[Path]) -> list[str]:
    """The ids of these files on the server; what it has already, files or parts, is not sent again.

    Raises SeveralReplicas, and DeltaServeError where the connection breaks or the user interrupts.
    """
    tasks = {file: progress.add_task(file.name, total=file.stat().st_size) for file in files}
    try:
        return [_sent(client, progress, task, file) for file, task in tasks.items()]
    except (KeyboardInterrupt, httpx.TransportError) as error:
        ours = [task for task in progress.tasks if task.id in tasks.values()]
        there, total = sum(task.completed for task in ours), sum(task.total or 0 for task in ours)
        if not there:
            raise
        why = f"The connection broke ({error})" if isinstance(error, httpx.TransportError) else "Interrupted"
        raise DeltaServeError(
            f"{why}: {decimal(int(there))} of {decimal(int(total))} are on the server; call it again to send the rest"
        ) from None


def _sent(client: httpx.Client, progress: Progress, task: TaskID, file: Path) -> str:
    from deltaserve.delta_store.blobs import digest_of

    size, digest = file.stat().st_size, digest_of(file)
    if known := _known(client, file.name, digest):
        progress.update(task, completed=size, description=f"{file.name} (was there)")
        return known
    upload = _upload(client, file.name, size, digest)
    there = {(part["bytes"], part["sha256"]): part["id"] for part in upload["parts"]}
    if there:
        progress.update(task, description=f"{file.name} (goes on)")
    ids = []
    for piece in _pieces(file):
        known = there.get((len(piece), hashlib.sha256(piece).hexdigest()))
        ids.append(known or _send_part(client, upload["id"], piece))
        progress.advance(task, len(piece))
    done = answer(client.post(f"/v1/uploads/{upload['id']}/complete", json={"part_ids": ids}))
    file_id: str = done["file"]["id"]
    return file_id


def _known(client: httpx.Client, name: str, digest: str) -> str | None:
    """The id of a file that is there, and will be for a day."""
    found = answer(client.get("/v1/files", params={"sha256": digest}))["data"]
    soon = time.time() + 86400
    fit = (one["id"] for one in found if one["filename"] == name and (one["expires_at"] or soon) >= soon)
    return next(fit, None)


def _upload(client: httpx.Client, name: str, size: int, digest: str) -> dict[str, Any]:
    """The upload of this file that was begun before, with its parts, or a new one."""
    begun: list[dict[str, Any]] = answer(client.get("/v1/uploads", params={"sha256": digest}))["data"]
    if same := [one for one in begun if (one["filename"], one["bytes"]) == (name, size)]:
        return max(same, key=lambda one: sum(part["bytes"] for part in one["parts"]))
    head = {"filename": name, "bytes": size, "mime_type": "application/octet-stream", "purpose": "user_data"}
    kept = {"anchor": "created_at", "seconds": KEPT_SECONDS}
    new: dict[str, Any] = answer(client.post("/v1/uploads", json={**head, "sha256": digest, "expires_after": kept}))
    return new


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while piece := opened.read(PART_BYTES):
            yield piece


def _send_part(client: httpx.Client, upload: str, piece: bytes) -> str:
    """Send a part, again where the connection breaks; returns its id."""

    def send() -> str:
        try:
            part: str = answer(client.post(f"/v1/uploads/{upload}/parts", files={"data": piece}))["id"]
        except Refusal as refusal:
            if refusal.code != "upload_not_found":
                raise
            raise SeveralReplicas(
                f"The parts do not all come to one server ({refusal}); give the address of one replica with --url"
            ) from refusal
        return part

    for pause in PAUSES_SECONDS:
        with suppress(httpx.TransportError):
            return send()
        time.sleep(pause)
    return send()
