"""How many variants a server had to load while it was measured, by its own count."""

import re
from collections import Counter
from collections.abc import Mapping

import httpx

# Counters of loads by variant: ours, then vLLM's for adapters.
COUNTERS = ("deltaserve_variant_load_seconds_count", "vllm:lora_adapter_load_seconds_count")
SAMPLE = re.compile(r"^([\w:]+)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
OTHER = "other"
"""The label that variants share for which a server keeps no metrics of their own."""


async def loads(client: httpx.AsyncClient) -> Counter[str] | None:
    """Loads since the server started, by variant; None if it has no metrics, or none that say so."""
    try:
        response = await client.get(client.base_url.join("/metrics"), timeout=10.0)
        response.raise_for_status()
    except httpx.HTTPError:
        return None
    return parse(response.text)


def parse(text: str) -> Counter[str] | None:
    """The loads that a page in Prometheus' text format counts; None where no line of it is about them."""
    if not any(f"# TYPE {name.removesuffix('_count')} " in text for name in COUNTERS):
        return None
    found: Counter[str] = Counter()
    for line in text.splitlines():
        sample = SAMPLE.match(line)
        if sample and sample[1] in COUNTERS:
            labels = dict(LABEL.findall(sample[2] or ""))
            found[labels.get("adapter_name") or labels.get("model_name", OTHER)] += round(float(sample[3]))
    return found


def since(before: Counter[str] | None, after: Counter[str] | None) -> dict[str, int] | None:
    """What was loaded in between; None where the server did not say."""
    return None if before is None or after is None else dict(after - before)


def of_model(cold_loads: Mapping[str, int] | None, model: str) -> int | None:
    """One model's share; None where the server did not say, or counted it among others."""
    if cold_loads is None:
        return None
    return cold_loads.get(model, None if OTHER in cold_loads else 0)
