"""``deltaserve compress``: from a fine-tune to its artifact."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.filesize import decimal

from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.pruning.options import BLOCKS, CODECS
from deltaserve.server.client import AsJson
from deltaserve.server.commands.progress import stages

if TYPE_CHECKING:
    from deltaserve.delta_store.compress import Receipt
    from deltaserve.delta_store.selection.select import Selection
    from deltaserve.delta_store.selection.tolerance import Tolerance


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
    embedding_codec: Annotated[
        str | None, typer.Option(help="How those directions are stored: the same codecs.")
    ] = None,
    whole_codec: Annotated[
        str | None, typer.Option(help="How norms, biases and what is too small to prune are stored.")
    ] = None,
    linear_rank: Annotated[int | None, typer.Option(help="low-rank: rank of each linear weight's delta.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="darex: what q is searched by: output (its change), or labels (their loss).")
    ] = None,
    per: Annotated[str | None, typer.Option(help="darex: one q for the model, or one for each layer.")] = None,
    unit: Annotated[str | None, typer.Option(help="structural: rows, columns or heads.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text for the base's activation profile, for darex, or to measure a tolerance on: plain, or .jsonl "
            "conversations."
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Take the activation profile from this file; write it there if there is none."),
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(help="Held-out text to measure on: plain, or .jsonl conversations. By default built-in prose."),
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Measure what the artifact keeps; its report goes into it. A search always does.")
    ] = True,
    max_kl: Annotated[
        str | None,
        typer.Option(
            help="Search the smallest artifact with this KL to the full fine-tune: nats, or 2% of the base's."
        ),
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="The same with this share of tokens on which both put the same first: 0.98.")
    ] = None,
    size: Annotated[
        int | None, typer.Option("--bytes", help="The artifact of the least KL in so many bytes, everything counted.")
    ] = None,
    task: Annotated[
        Path | None, typer.Option(help="Prompts and answers in .jsonl, scored by exact match of the greedy answer.")
    ] = None,
    min_score: Annotated[
        float | None, typer.Option(help="Search the smallest artifact with this score on --task: 0.9.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Where a search draws what it tried; by default beside the artifact.")
    ] = None,
    memory: Annotated[
        str,
        typer.Option(
            help="Run models (to measure, and for the activation profile) whole in memory or, with the same figures, "
            "layers one at a time: auto (default: whole where it takes at most half of the free memory), whole, layers."
        ),
    ] = "auto",
    force: Annotated[
        bool, typer.Option(help="Write the nearest artifact where nothing is within the tolerance.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compress a fine-tune into one small file: its delta from the base, pruned and quantised.

    Each method takes some of the options and refuses the others; those left out are its own defaults. A conversation
    is a line of JSON with "prompt" and "answer", or with "messages".

    With a tolerance (--max-kl, --min-agreement, --bytes, or --task and --min-score) it searches method and options,
    those that are given being settled: on --calibration text, confirmed on --evaluate text or a third of the former.
    An interrupted search goes on where it stopped.

    Example: `deltaserve compress ./base ./reviews -o reviews.safetensors --drop 0.95 --evaluate held-out.jsonl`

    Example: `deltaserve compress ./base ./reviews -o reviews.safetensors --max-kl 2% --calibration texts.jsonl`
    """
    tolerance = _tolerance(max_kl, min_agreement, size, min_score)
    choices = {
        "drop": drop,
        "block": block,
        "codec": codec,
        "seed": seed,
        "rank": rank,
        "embedding_codec": embedding_codec,
        "whole_codec": whole_codec,
        "linear_rank": linear_rank,
        "judge": judge,
        "per": per,
        "unit": unit,
    }
    options = {name: value for name, value in choices.items() if value is not None}
    if tolerance is not None:
        if not measure:
            raise OptionError("A search measures, and its artifact has the report; leave --no-measure out")
        _select(
            base,
            fine_tuned,
            output,
            tolerance,
            _Texts(calibration, evaluate, task),
            as_json,
            method=method,
            options=options,
            profile=profile,
            plot=plot,
            force=force,
            memory=memory,
        )
        return
    for name, given in (("--task", task), ("--plot", plot), ("--force", force)):
        if given:
            raise OptionError(f"{name} is for a search; add a tolerance such as --max-kl 2%, or leave it out")
    from deltaserve.delta_store.compress import compress

    with stages() as progress:
        receipt = compress(
            base,
            fine_tuned,
            output,
            method=method,
            options=options,
            calibration=calibration,
            profile=profile,
            evaluate=evaluate,
            measure=measure,
            memory=memory,
            progress=progress,
        )
    _warn(receipt)
    if as_json:
        typer.echo(json.dumps({**asdict(receipt), "ratio": round(receipt.ratio, 2)}, indent=2))
    else:
        _print(_lines(receipt))


class _Texts(NamedTuple):
    """What the user gave to search on, to confirm on, and to score."""

    calibration: Path | None
    evaluate: Path | None
    task: Path | None


def _tolerance(
    max_kl: str | None, min_agreement: float | None, size: int | None, min_score: float | None
) -> "Tolerance | None":
    """The one that was given; OptionError for two, or for one that is no number."""
    from deltaserve.delta_store.selection.tolerance import Tolerance

    given = {"max_kl": max_kl, "min_agreement": min_agreement, "bytes": size, "min_score": min_score}
    kinds = [kind for kind, value in given.items() if value is not None]
    if len(kinds) > 1:
        named = " and ".join(f"--{kind.replace('_', '-')}" for kind in kinds)
        raise OptionError(f"A search has one tolerance, not {named}; give one of them")
    if not kinds:
        return None
    text = str(given[kinds[0]])
    relative = kinds[0] == "max_kl" and text.endswith("%")
    try:
        value = float(text.removesuffix("%")) / (100 if relative else 1)
    except ValueError as error:
        raise OptionError(f"--max-kl is {text!r}; give nats (0.004), or a share of the base's KL (2%)") from error
    return Tolerance(kinds[0], value, relative)


def _select(
    base: str, fine_tuned: str, output: Path, tolerance: "Tolerance", texts: _Texts, as_json: bool, **settings: Any
) -> None:
    from deltaserve.delta_store.selection.select import select
    from deltaserve.delta_store.selection.texts import Files

    if texts.task and texts.calibration:
        raise OptionError("A task's prompts and answers are what its search runs on; leave --calibration out")
    files = Files(texts.task or texts.calibration, texts.evaluate, is_task=texts.task is not None)
    with stages() as progress:
        selection = select(base, fine_tuned, output, tolerance, files=files, progress=progress, **settings)
    _warn(selection.receipt)
    if as_json:
        ratio = round(selection.receipt.ratio, 2)
        receipt = {**asdict(selection.receipt), "ratio": ratio, "quality": selection.report}
        typer.echo(json.dumps({**receipt, "selection": _but_receipt(selection)}, indent=2))
    else:
        typer.echo("\n".join(selection.path) + "\n")
        _print(_lines(selection.receipt))
        _print(_selected(selection))


def _but_receipt(selection: "Selection") -> dict[str, Any]:
    return {name: value for name, value in asdict(selection).items() if name not in ("receipt", "report")}


def _warn(receipt: "Receipt") -> None:
    for warning in receipt.warnings:
        Console(stderr=True).print(f"Warning: {warning}", markup=False, highlight=False, soft_wrap=True)


def _print(lines: Iterable[tuple[str, str]]) -> None:
    typer.echo("\n".join(f"{name:<12}{value}" for name, value in lines))


def _selected(selection: "Selection") -> Iterator[tuple[str, str]]:
    report: Any = selection.report
    dare, seeds = report["dare"], report["seeds"]
    if report["gain_kept"] is not None:
        yield "gain kept", f"{report['gain_kept']:.1%} of what fine-tuning gained in loss"
    yield "plain DARE", f"KL {dare['kl_mean']:.5f} at {dare['bytes']:,} bytes ({dare['made_by']})"
    if seeds:
        yield "seeds", ", ".join(f"{seed}: KL {point['kl_mean']:.5f}" for seed, point in seeds.items())
    if "score_artifact" in report:
        base = "-" if report["score_base"] is None else f"{report['score_base']:.1%}"
        yield (
            "score",
            f"{base} base, {report['score_fine_tuned']:.1%} fine-tune, {report['score_artifact']:.1%} artifact",
        )
    yield "bytes", ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in report["bytes"].items())
    yield "chosen", selection.chosen
    yield "tried", f"{selection.tried} points, {selection.resumed} of them earlier ({selection.journal})"
    yield "plot", selection.plot or "none; for one run: pip install 'deltaserve[plot]'"


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
        yield "measured on", receipt.text or "-"
        yield "KL", f"{quality.kl_mean:.5f} mean, {quality.kl_p99:.4f} at the 99th percentile"
        yield "same token", f"{quality.top1_agreement:.1%} of {quality.tokens}"
        yield "loss", f"{base} base, {quality.loss_fine_tuned:.4f} fine-tune, {quality.loss_artifact:.4f} artifact"
        yield "memory", receipt.memory or "-"
