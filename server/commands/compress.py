"""``deltaserve compress``: from a fine-tune to its artifact."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal

from deltaserve.delta_store.pruning.options import BLOCKS, CODECS
from deltaserve.server.client import AsJson
from deltaserve.server.commands.progress import stages

if TYPE_CHECKING:
    from deltaserve.delta_store.compress import Receipt


def command(
    base: Annotated[str, typer.Argument(help="Base checkpoint: a folder, a GGUF file, or org/name.")],
    fine_tuned: Annotated[str, typer.Argument(help="Its fine-tune: a checkpoint, or the folder of a LoRA adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write the artifact to.")],
    method: Annotated[
        str | None, typer.Option(help="weighted (default), dare, lora (default for adapters) or lossless.")
    ] = None,
    drop: Annotated[float | None, typer.Option(help="p, the fraction pruned: 0.98 keeps 2 %.")] = None,
    block: Annotated[
        int | None, typer.Option(help=f"V, rows that share their kept columns: {', '.join(map(str, BLOCKS))}.")
    ] = None,
    codec: Annotated[str | None, typer.Option(help=f"How survivors are stored: {', '.join(CODECS)}.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws the kept columns.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the embedding's and the output head's delta.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text for the base's activation profile: plain, or .jsonl conversations.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Take the activation profile from this file; write it there if there is none."),
    ] = None,
    evaluate: Annotated[
        Path | None, typer.Option(help="Held-out text to measure on: plain, or .jsonl conversations.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compress a fine-tune into one small file: its delta from the base, pruned and quantised.

    Options that are left out are the method's own defaults. A conversation is a line of JSON with "prompt" and
    "answer", or with "messages".

    Example: `deltaserve compress ./base ./reviews -o reviews.safetensors --drop 0.95 --evaluate held-out.jsonl`
    """
    from deltaserve.delta_store.compress import compress

    choices = {"drop": drop, "block": block, "codec": codec, "seed": seed, "rank": rank}
    with stages() as progress:
        receipt = compress(
            base,
            fine_tuned,
            output,
            method=method,
            options={name: value for name, value in choices.items() if value is not None},
            calibration=calibration,
            profile=profile,
            evaluate=evaluate,
            progress=progress,
        )
    for warning in receipt.warnings:
        Console(stderr=True).print(f"Warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps({**asdict(receipt), "ratio": round(receipt.ratio, 2)}, indent=2))
    else:
        typer.echo("\n".join(f"{name:<12}{value}" for name, value in _lines(receipt)))


def _lines(receipt: "Receipt") -> Iterator[tuple[str, str]]:
    yield "artifact", receipt.path
    yield "digest", receipt.digest
    yield "method", receipt.method
    yield "tensors", f"{receipt.tensors_changed} of {receipt.tensors_total} differ from the base"
    yield "size", f"{decimal(receipt.size_bytes)} ({receipt.size_bytes:,} bytes), the whole variant"
    yield "ratio", f"1/{receipt.ratio:.1f} of the 16-bit checkpoint ({decimal(receipt.full_bytes)})"
    if receipt.profile is not None:
        yield "profile", receipt.profile
    if (quality := receipt.quality) is not None:
        base = "-" if quality.loss_base is None else f"{quality.loss_base:.4f}"
        yield "KL", f"{quality.kl_mean:.5f} mean, {quality.kl_p99:.4f} at the 99th percentile"
        yield "same token", f"{quality.top1_agreement:.1%} of {quality.tokens}"
        yield "loss", f"{base} base, {quality.loss_fine_tuned:.4f} fine-tune, {quality.loss_artifact:.4f} artifact"
