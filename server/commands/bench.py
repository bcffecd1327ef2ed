"""``deltaserve bench``: latency and throughput of a running server, or what variants cost in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from deltaserve.delta_store.errors import OptionError
from deltaserve.kernels.waiting import wait_awake
from deltaserve.server.bench.goodput import LIMITED
from deltaserve.server.bench.mix import MIXES

if TYPE_CHECKING:
    from deltaserve.server.bench.engine_costs import Plan
    from deltaserve.server.bench.report import Report
    from deltaserve.server.bench.setup import Setup

DEFAULT_CONCURRENCY = 8


def command(
    url: Annotated[str | None, typer.Argument(help="Address of an OpenAI server, with or without /v1.")] = None,
    models: Annotated[
        str | None, typer.Option(help="Models to ask, comma-separated, most popular first; all that the server lists.")
    ] = None,
    mix: Annotated[str, typer.Option(help=f"Popularity of the models: {', '.join(MIXES)}.")] = "uniform",
    zipf_exponent: Annotated[float, typer.Option(min=0, help="Of --mix zipf: weight 1 / rank ** exponent.")] = 1.0,
    requests: Annotated[int, typer.Option(min=1, help="Requests to measure.")] = 100,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Requests under way: always (8 if not given), or with --rate at most (no bound)."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Send so many requests a second, whatever the server does.")
    ] = None,
    burstiness: Annotated[
        float, typer.Option(min=0.001, help="Of --rate: 1 is Poisson, less comes in bursts, more is steadier.")
    ] = 1.0,
    warmup: Annotated[int | None, typer.Option(min=0, help="Requests before the measurement; one a model.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts, one a line; random words if not given.")
    ] = None,
    prompt_words: Annotated[str, typer.Option(help="Words of a random prompt: WORDS or LOW:HIGH.")] = "32",
    shared_prefix: Annotated[int, typer.Option(min=0, help="Words that all random prompts begin with.")] = 0,
    endpoint: Annotated[Literal["chat", "completions"], typer.Option(help="Which endpoint to ask.")] = "chat",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens: 64, or with --engine 16.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for answers of max-tokens exactly (not OpenAI's).")] = False,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds until an unfinished request counts as failed.")
    ] = 300,
    seed: Annotated[int, typer.Option(help="Of mix, arrivals and random prompts.")] = 0,
    goodput: Annotated[
        list[str] | None,
        typer.Option(help=f"NAME:MS, repeatable: count requests within it; NAME is {', '.join(LIMITED)}."),
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key sent as bearer token.")] = None,
    max_failed: Annotated[float, typer.Option(min=0, max=1, help="Share of requests that may fail before exit 1.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw the run into this file (.png, .svg, .pdf).")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the report as JSON to this file as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    engine: Annotated[str | None, typer.Option(help="Measure this base in process instead of a server.")] = None,
    variants: Annotated[
        str | None, typer.Option(help="Of --engine: artifacts, comma-separated; one is made up if not given.")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="Of --engine: the activation profile of the artifacts.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Of --engine: how often each case takes its turn at most.")] = 5,
    minutes: Annotated[
        float, typer.Option(min=0, help="Of --engine: after the first, no repeat begins that would end later.")
    ] = 5,
) -> None:
    """Measure the latency and throughput of any OpenAI server, over a mix of its models.

    With --engine, measure what variants cost beside the bare base in this process, without HTTP.

    Example: `deltaserve bench http://127.0.0.1:8000 --mix zipf --concurrency 16 --requests 200`
    """
    if save and not save.parent.is_dir():
        raise OptionError(f"--save {save}: there is no folder {save.parent}; make it first")
    if (url is None) == (engine is None):
        raise OptionError("Give either the address of a server or --engine BASE")
    if engine is not None:
        wait_awake()
        from deltaserve.server.bench.engine_costs import Plan

        paths = tuple(map(Path, _names(variants)))
        plan = Plan(engine, paths, profile, concurrency or 16, repeats, max_tokens or 16, seed, minutes)
        return _deliver_costs(plan, save, as_json)
    assert url is not None
    from deltaserve.server.bench.client import Asking
    from deltaserve.server.bench.goodput import parse_limits
    from deltaserve.server.bench.plot import check
    from deltaserve.server.bench.plot import plot as draw
    from deltaserve.server.bench.prompts import prompts_from_file, random_prompts, word_range
    from deltaserve.server.bench.setup import Setup

    limits, words = parse_limits(goodput or []), word_range(prompt_words)
    if plot:
        check(plot)
    names = _names(models) if models else _served(url, api_key)
    warmup = len(names) if warmup is None else warmup
    setup = Setup(
        url=url,
        mix=mix,
        models=names,
        requests=requests,
        concurrency=concurrency if rate or concurrency else DEFAULT_CONCURRENCY,
        warmup_requests=warmup,
        prompts=_described(prompts, words, shared_prefix),
        seed=seed,
        asking=Asking(endpoint, max_tokens or 64, temperature, ignore_eos, timeout),
        rate=rate,
        burstiness=burstiness,
        zipf_exponent=zipf_exponent,
        goodput_ms=limits,
    )
    count = warmup + requests
    texts = prompts_from_file(prompts, count) if prompts else random_prompts(words, count, seed, shared_prefix)
    report = _measure(setup, texts, api_key)
    if plot:
        draw(report, plot)
    _deliver(report.as_json(), report.print, save, as_json)
    if report.total.failed_share > max_failed:
        typer.echo(f"{report.total.failed_share:.1%} of the requests did not complete.", err=True)
        raise typer.Exit(1)


def _names(given: str | None) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, given.split(",")))) if given else ()


def _described(prompts: Path | None, words: tuple[int, int], shared_prefix: int) -> str:
    if prompts:
        return f"prompts from {prompts}"
    length = f"{words[0]}" if words[0] == words[1] else f"{words[0]} to {words[1]}"
    return f"prompts of {length} random words" + (f" after {shared_prefix} shared ones" if shared_prefix else "")


def _served(url: str, api_key: str | None) -> tuple[str, ...]:
    import asyncio

    from deltaserve.server.bench.load import open_client, served_models

    async def ask() -> tuple[str, ...]:
        async with open_client(url, api_key) as client:
            return tuple(await served_models(client))

    return asyncio.run(ask())


def _measure(setup: "Setup", prompts: list[str], api_key: str | None) -> "Report":
    import asyncio

    from deltaserve.server.bench.progress import requests_progress
    from deltaserve.server.bench.run import run

    with requests_progress(len(prompts), setup.warmup_requests) as on_record:
        return asyncio.run(run(setup, prompts, api_key, on_record))


def _deliver_costs(plan: "Plan", save: Path | None, as_json: bool) -> None:
    from deltaserve.server.bench.engine_costs import measure
    from deltaserve.server.commands.progress import stages

    with stages() as show:
        costs = measure(plan, show)
    _deliver(costs.as_json(), costs.print, save, as_json)


def _deliver(content: dict[str, Any], show: Callable[[Console], None], save: Path | None, as_json: bool) -> None:
    document = json.dumps(content, indent=2)
    if save:
        partial = save.with_name(save.name + ".partial")
        partial.write_text(document + "\n", encoding="utf-8")
        partial.replace(save)
    if as_json:
        typer.echo(document)
    else:
        show(Console())
