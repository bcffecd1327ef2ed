"""``deltaserve push``: send an artifact, a LoRA adapter or a whole checkpoint to a running server."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.client import DEFAULT_URL, AsJson, Refusal, Url, answer, connected, variant_path
from deltaserve.server.commands.progress import Bars
from deltaserve.server.commands.push_checkpoint import checkpoint_files, follow, search_of
from deltaserve.server.commands.push_parts import SeveralReplicas, is_large, send_files

if TYPE_CHECKING:
    import httpx

PIECE_BYTES = 2**18


def command(
    file: Annotated[
        Path,
        typer.Argument(help="Artifact that deltaserve compress wrote, or folder of a LoRA adapter or a checkpoint."),
    ],
    name: Annotated[str, typer.Option(help="Name under which the variant is served.")],
    url: Url = DEFAULT_URL,
    profile: Annotated[
        Path | None, typer.Option(help="Activation profile; looked for beside the artifact and in the cache.")
    ] = None,
    max_kl: Annotated[
        str | None,
        typer.Option(help="Checkpoint: KL to it that is allowed, in nats, or 2% of the base's. Default: 2%."),
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Checkpoint: instead, share of tokens on which both put the same first.")
    ] = None,
    size: Annotated[
        int | None, typer.Option("--bytes", help="Checkpoint: instead, the least KL in so many bytes.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Checkpoint: .jsonl conversations like those it will see, to measure on.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Checkpoint: search this method alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Send an artifact, a LoRA adapter or a whole checkpoint to a server, as the newest version of a variant.

    What the server has already is not sent again; cut off in a large file, the next call sends the rest. A checkpoint
    is compressed there in a job, which is followed to its end; interrupted here, it goes on there.

    Example: `deltaserve push reviews.safetensors --name reviews`

    Example: `deltaserve push ./reviews --name reviews --max-kl 2% --calibration texts.jsonl`
    """
    if not file.exists():
        raise OptionError(f"There is no file {file}")
    search = search_of(max_kl, min_agreement, size, method)
    is_checkpoint = file.is_dir() and not (file / "adapter_config.json").is_file()
    if (search or calibration) and not is_checkpoint:
        raise OptionError(
            f"{file} is no folder of a checkpoint, so there is nothing to search; leave the tolerance out"
        )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with connected(url) as client, Bars(*columns) as progress:
        if is_checkpoint:
            ids = send_files(client, progress, checkpoint_files(file, calibration))
            job = answer(client.post("/v1/variants", json={"name": name, "file_ids": ids, **search}))
            progress.stop()
            receipt = follow(client, job["id"])
        elif file.is_dir():
            receipt = _send_adapter(client, progress, file, name)
        else:
            _send_profile(client, progress, file, profile)
            receipt = _known(client, file, name) or _send_artifact(client, progress, file, name)
    if as_json:
        typer.echo(json.dumps(receipt, indent=2))
    else:
        tensors = f"{receipt['tensors_applied']} of {receipt['tensors_total']} tensors"
        typer.echo(
            f"{name}: version {receipt['version']}, {receipt['digest'][:12]}, "
            f"{decimal(receipt['size_bytes'])}, {tensors}"
        )


def _known(client: "httpx.Client", file: Path, name: str) -> Any:
    """The receipt of an artifact whose bytes the server has already, None if they must be sent."""
    from deltaserve.delta_store.blobs import digest_of

    try:
        return answer(client.post("/v1/variants", json={"name": name, "digest": digest_of(file)}))
    except Refusal as refusal:
        if refusal.code != "file_not_found":
            raise
        return None


def _send_artifact(client: "httpx.Client", progress: Progress, file: Path, name: str) -> Any:
    """In one request; a large one in parts before."""
    if is_large([file]) and file.suffix == ".safetensors":
        with suppress(SeveralReplicas):  # one request always comes to one
            return _named(client, name, send_files(client, progress, [file]))
    return _send(client, progress, file, variant_path(name))


def _send(client: "httpx.Client", progress: Progress, file: Path, path: str) -> Any:
    """PUT a file with its length and checksum announced."""
    from deltaserve.delta_store.blobs import digest_of

    size = file.stat().st_size
    task = progress.add_task(file.name, total=size)

    def body() -> Iterator[bytes]:
        with file.open("rb") as opened:
            while piece := opened.read(PIECE_BYTES):
                yield piece
                progress.advance(task, len(piece))

    headers = {"Content-Length": str(size), "X-Checksum-Sha256": digest_of(file)}
    return answer(client.put(path, content=body(), headers=headers))


def _send_profile(client: "httpx.Client", progress: Progress, file: Path, given: Path | None) -> None:
    """Send the profile that an artifact needs, if the server does not have it."""
    from deltaserve.delta_store.codec.artifact import open_artifact
    from deltaserve.delta_store.profile import file_name, profile_folder

    digest = open_artifact(file).manifest.profile
    if digest is None or client.head(f"/v1/profiles/{digest}").is_success:
        return
    places = [given] if given else [folder / file_name(digest) for folder in (file.parent, profile_folder())]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise OptionError(
            f"{file} needs activation profile {digest[:12]}, which is neither on the server nor in "
            f"{' or '.join(map(str, places))}; give its file with --profile"
        )
    _send(client, progress, found, f"/v1/profiles/{digest}")


def _send_adapter(client: "httpx.Client", progress: Progress, folder: Path, name: str) -> Any:
    """Send the files of a LoRA adapter, in a form or large ones in parts; the server encodes them."""
    from deltaserve.delta_store.variant_files import VARIANT_FILES
    from deltaserve.server.files.contents import ADAPTER_FILES

    for part in ADAPTER_FILES:
        if not (folder / part).is_file():
            raise OptionError(f"{folder} is no LoRA adapter in safetensors: {part} is missing")
    files = [folder / part for part in (*ADAPTER_FILES, *VARIANT_FILES) if (folder / part).is_file()]
    if is_large(files):
        with suppress(SeveralReplicas):
            return _named(client, name, send_files(client, progress, files))
    with ExitStack() as stack:
        parts = [(file.name, stack.enter_context(progress.open(file, "rb", description=file.name))) for file in files]
        form = [("adapter", part) for part in parts]
        return answer(client.post("/v1/variants", data={"name": name}, files=form))


def _named(client: "httpx.Client", name: str, ids: list[str]) -> Any:
    """The receipt of a variant that is made of stored files."""
    return answer(client.post("/v1/variants", json={"name": name, "file_ids": ids}))
