"""One benchmark run from its setup to its report: warm up, measure, reckon."""

from collections.abc import Callable, Sequence

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.bench.client import Ask, Outcome, Record
from deltaserve.server.bench.load import closed_loop, open_client
from deltaserve.server.bench.mix import assign
from deltaserve.server.bench.report import Report, Setup
from deltaserve.server.bench.statistics import by_model, figures


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
    warmup = _asks("distinct", setup, prompts[: setup.warmup_requests])
    measured = _asks(setup.mix, setup, prompts[setup.warmup_requests :])
    async with open_client(setup.url, api_key) as client:
        warm = await closed_loop(client, setup.asking, warmup, setup.concurrency, on_record)
        records = await closed_loop(client, setup.asking, measured, setup.concurrency, on_record)
    warmup_failed = sum(record.outcome is not Outcome.COMPLETED for record in warm)
    return Report(setup, warmup_failed, figures(records), by_model(records, setup.models))


def _asks(mix: str, setup: Setup, prompts: Sequence[str]) -> list[Ask]:
    models = assign(mix, setup.models, len(prompts), setup.seed)
    return [Ask(model, prompt) for model, prompt in zip(models, prompts, strict=True)]
