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
        str | None,
        typer.Option(
            help="weighted (default), lora (default for adapters), dare, darex, magnitude, wanda, structural, "
            "low-rank, dense, low-rank-residual, dense-residual, lora-darex or lossless."
        ),
    ] = None,
    drop: Annotated[float | None, typer.Option(help="p, the fraction pruned: 0.98 keeps 2 %.")] = None,
    block: Annotated[
        int | None, typer.Option(help=f"V, rows that share their kept columns: {', '.join(map(str, BLOCKS))}.")
    ] = None,
    codec: Annotated[str | None, typer.Option(help=f"How survivors are stored: {', '.join(CODECS)}.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws what is kept at random.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the embedding's and the output head's delta.")] = None,
    linear_rank: Annotated[int | None, typer.Option(help="low-rank: rank of each linear weight's delta.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="darex: what q is searched by: output (its change), or labels (their loss).")
    ] = None,
    per: Annotated[str | None, typer.Option(help="darex: one q for the model, or one for each layer.")] = None,
    unit: Annotated[str | None, typer.Option(help="structural: rows, columns or heads.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text for the base's activation profile, or for darex: plain, or .jsonl conversations."),
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

    Each method takes some of the options and refuses the others; those left out are its own defaults. A conversation
    is a line of JSON with "prompt" and "answer", or with "messages".

    Example: `deltaserve compress ./base ./reviews -o reviews.safetensors --drop 0.95 --evaluate held-out.jsonl`
    """
    from deltaserve.delta_store.compress import compress

    choices = {
        "drop": drop,
        "block": block,
        "codec": codec,
        "seed": seed,
        "rank": rank,
        "linear_rank": linear_rank,
        "judge": judge,
        "per": per,
        "unit": unit,
    }
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
    if receipt.q is not None:
        yield "q", " to ".join(f"{q:.5g}" for q in sorted(set(receipt.q)))
    if (quality := receipt.quality) is not None:
        base = "-" if quality.loss_base is None else f"{quality.loss_base:.4f}"
        yield "KL", f"{quality.kl_mean:.5f} mean, {quality.kl_p99:.4f} at the 99th percentile"
        yield "same token", f"{quality.top1_agreement:.1%} of {quality.tokens}"
        yield "loss", f"{base} base, {quality.loss_fine_tuned:.4f} fine-tune, {quality.loss_artifact:.4f} artifact"
