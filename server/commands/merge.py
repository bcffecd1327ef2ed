"""``deltaserve merge``: base and artifact back to an ordinary checkpoint."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from deltaserve.server.client import AsJson
from deltaserve.server.commands.progress import stages


def command(
    base: Annotated[str, typer.Argument(help="The base that the artifact was made against.")],
    file: Annotated[Path, typer.Argument(help="Artifact that deltaserve compress wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the checkpoint.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default as the fine-tune was.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Activation profile; looked for beside the artifact and in the cache.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write base and artifact together as an ordinary checkpoint that transformers loads, with its tokenizer.

    A lossless artifact gives the fine-tune back bit for bit.

    Example: `deltaserve merge ./base reviews.safetensors -o ./reviews-merged`
    """
    from deltaserve.delta_store.merge import merge

    with stages() as progress:
        merged = merge(base, file, output, dtype, profile, lambda done, total: progress("Merge", done, total))
    if as_json:
        typer.echo(json.dumps({**asdict(merged), "folder": str(merged.folder)}, indent=2))
    else:
        typer.echo(f"{merged.folder}: {merged.tensors} tensors, {decimal(merged.size_bytes)}")
