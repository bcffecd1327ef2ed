"""One benchmark run from its setup to its report: warm up, measure, reckon."""

from collections.abc import Callable, Sequence

import httpx

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.bench.arrivals import arrivals
from deltaserve.server.bench.client import Ask, Outcome, Record
from deltaserve.server.bench.cold_loads import loads, since
from deltaserve.server.bench.goodput import goodput
from deltaserve.server.bench.load import closed_loop, open_client, open_loop
from deltaserve.server.bench.mix import assign
from deltaserve.server.bench.report import Report
from deltaserve.server.bench.setup import Setup
from deltaserve.server.bench.statistics import by_model, figures

WARMUP_CONCURRENCY = 8
"""For an open loop without a bound of its own."""


async def run(
    setup: Setup,
    prompts: Sequence[str],
    api_key: str | None = None,
    on_record: Callable[[Record], None] = lambda record: None,
) -> Report:
    """Runs ``setup`` with one of ``prompts`` a request, those of the warm-up first; ``on_record`` sees each as it ends.

    The warm-up goes round the models, so that every one of them is loaded before the clock counts.
    """
    needed = setup.warmup_requests + setup.requests
    if len(prompts) != needed:
        raise OptionError(f"{len(prompts)} prompts for {needed} requests; each needs one")
    warmup = _asks("rotation", setup, prompts[: setup.warmup_requests])
    measured = _asks(setup.mix, setup, prompts[setup.warmup_requests :])
    async with open_client(setup.url, api_key) as client:
        at_once = setup.concurrency or WARMUP_CONCURRENCY
        warm = await closed_loop(client, setup.asking, warmup, at_once, on_record)
        before = await loads(client)
        records = await _measure(client, setup, measured, on_record)
        cold_loads = since(before, await loads(client))
    warmup_failed = sum(record.outcome is not Outcome.COMPLETED for record in warm)
    total = figures(records)
    good = goodput(records, setup.goodput_ms, total.span_s)
    return Report(setup, warmup_failed, total, by_model(records, setup.models), good, cold_loads, tuple(records))


async def _measure(
    client: httpx.AsyncClient, setup: Setup, asks: Sequence[Ask], on_record: Callable[[Record], None]
) -> list[Record]:
    if setup.rate is None:
        return await closed_loop(client, setup.asking, asks, setup.concurrency or len(asks), on_record)
    due_s = arrivals(len(asks), setup.rate, setup.burstiness, setup.seed)
    return await open_loop(client, setup.asking, asks, due_s, setup.concurrency, on_record)


def _asks(mix: str, setup: Setup, prompts: Sequence[str]) -> list[Ask]:
    models = assign(
        mix, setup.models, len(prompts), setup.seed, at_once=setup.concurrency, exponent=setup.zipf_exponent
    )
    return [Ask(model, prompt) for model, prompt in zip(models, prompts, strict=True)]
