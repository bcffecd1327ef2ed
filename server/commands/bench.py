"""``deltaserve bench``: latency and throughput of a running server."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.bench.mix import MIXES

if TYPE_CHECKING:
    from deltaserve.server.bench.report import Report, Setup


def command(
    url: Annotated[str, typer.Argument(help="Address of an OpenAI server, with or without /v1.")],
    models: Annotated[
        str | None, typer.Option(help="Models to ask, comma-separated, most popular first; all that the server lists.")
    ] = None,
    mix: Annotated[str, typer.Option(help=f"Popularity of the models: {', '.join(MIXES)}.")] = "uniform",
    requests: Annotated[int, typer.Option(min=1, help="Requests to measure.")] = 100,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at any time.")] = 8,
    warmup: Annotated[int | None, typer.Option(min=0, help="Requests before the measurement; one a model.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts, one a line; random words if not given.")
    ] = None,
    prompt_words: Annotated[int, typer.Option(min=1, help="Words of a random prompt.")] = 32,
    endpoint: Annotated[Literal["chat", "completions"], typer.Option(help="Which endpoint to ask.")] = "chat",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for answers of max-tokens exactly (not OpenAI's).")] = False,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds until an unfinished request counts as failed.")
    ] = 300,
    seed: Annotated[int, typer.Option(help="Of the mix and the random prompts.")] = 0,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key sent as bearer token.")] = None,
    max_failed: Annotated[float, typer.Option(min=0, max=1, help="Share of requests that may fail before exit 1.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Write the report as JSON to this file as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure the latency and throughput of any OpenAI server, over a mix of its models.

    Example: `deltaserve bench http://127.0.0.1:8000 --mix zipf --concurrency 16 --requests 200`
    """
    import asyncio

    from deltaserve.server.bench.client import Asking
    from deltaserve.server.bench.prompts import prompts_from_file, random_prompts
    from deltaserve.server.bench.report import Setup

    if save and not save.parent.is_dir():
        raise OptionError(f"--save {save}: there is no folder {save.parent}; make it first")
    names = tuple(filter(None, map(str.strip, models.split(",")))) if models else asyncio.run(_served(url, api_key))
    warmup = len(names) if warmup is None else warmup
    count = warmup + requests
    setup = Setup(
        url=url,
        mix=mix,
        models=names,
        requests=requests,
        concurrency=concurrency,
        warmup_requests=warmup,
        prompts=f"prompts from {prompts}" if prompts else f"prompts of {prompt_words} random words",
        seed=seed,
        asking=Asking(endpoint, max_tokens, temperature, ignore_eos, timeout),
    )
    texts = prompts_from_file(prompts, count) if prompts else random_prompts(prompt_words, count, seed)
    _deliver(_measure(setup, texts, api_key), save, as_json, max_failed)


async def _served(url: str, api_key: str | None) -> tuple[str, ...]:
    from deltaserve.server.bench.load import open_client, served_models

    async with open_client(url, api_key) as client:
        return tuple(await served_models(client))


def _measure(setup: "Setup", prompts: list[str], api_key: str | None) -> "Report":
    import asyncio

    from rich.progress import Progress

    from deltaserve.server.bench.run import run

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("Requests", total=len(prompts))
        return asyncio.run(run(setup, prompts, api_key, on_record=lambda record: progress.advance(bar)))


def _deliver(report: "Report", save: Path | None, as_json: bool, max_failed: float) -> None:
    """Prints and saves; exit status 1 if more than the share ``max_failed`` of the requests did not complete."""
    document = json.dumps(report.as_json(), indent=2)
    if save:
        partial = save.with_name(save.name + ".partial")
        partial.write_text(document + "\n", encoding="utf-8")
        partial.replace(save)
    if as_json:
        typer.echo(document)
    else:
        report.print(Console())
    if report.total.failed_share > max_failed:
        typer.echo(f"{report.total.failed_share:.1%} of the requests did not complete.", err=True)
        raise typer.Exit(1)
