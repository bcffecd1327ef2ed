"""``GET /v1/console``: what the console shows beside the other routes, small enough to be asked every other second."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

from fastapi import APIRouter, Request
from prometheus_client.metrics import MetricWrapperBase

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.server.access.door import keys_required
from deltaserve.server.access.keys import Key, Role
from deltaserve.server.api.kinds import is_encoder
from deltaserve.server.api.responses import ERRORS
from deltaserve.server.metrics import Metrics
from deltaserve.server.version import installed_version

router = APIRouter(tags=["console"], responses=ERRORS)


@dataclass(frozen=True, slots=True)
class Base:
    """The base. ``bytes`` is its size in 16 bits, which artifacts are compared with."""

    id: str
    fingerprint: str
    kind: Literal["decoder", "encoder"]
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks; ``models`` are the names and patterns that the key may ask, null is all."""

    name: str | None
    role: Role
    models: list[str] | None


@dataclass(frozen=True, slots=True)
class Memory:
    """The versions in memory, of at most so many and so many bytes; ``swapped`` is the variant in the base's weights.

    ``resident`` are digests, ``pinned`` names.
    """

    slots: int
    slots_used: int
    bytes: int
    bytes_used: int
    resident: list[str]
    pinned: list[str]
    swapped: str | None


@dataclass(frozen=True, slots=True)
class Counts:
    """One model's requests since the server started, from the counters of /metrics.

    ``request_s`` is the sum over ``requests`` ended ones, ``first_token_s`` that over ``first_tokens``. ``tokens`` were
    generated, ``prompt_tokens`` read: all that an encoder has.
    """

    in_flight: int
    requests: int
    request_s: float
    first_tokens: int
    first_token_s: float
    tokens: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Figures:
    """``clock_s`` is when, on the server's clock. ``counts`` is by model; those without metrics of their own share
    ``other``. What a key may not ask is left out."""

    object: Literal["console"]
    version: str
    keys: bool
    caller: Caller
    base: Base
    memory: Memory
    running: int
    waiting: int
    cache_used: float
    max_upload_bytes: int
    clock_s: float
    counts: dict[str, Counts]


@router.get("/v1/console")
def get_figures(request: Request) -> Figures:
    """The base, who asks, what is in memory, and what each model has done."""
    state, key = request.app.state, request.state.key
    engine, settings = state.engine.state(), state.settings
    memory = Memory(
        slots=engine.bank_slots,
        slots_used=len(engine.residents),
        bytes=engine.bank_bytes,
        bytes_used=sum(one.nbytes for one in engine.residents),
        resident=[one.digest for one in engine.residents if may_see(key, one.variant)],
        pinned=sorted(name for name in state.engine.bank.pinned if may_see(key, name)),
        swapped=engine.swapped if engine.swapped and may_see(key, engine.swapped) else None,
    )
    parameters = parameter_count(settings.base)
    counted = counts(state.metrics)
    return Figures(
        object="console",
        version=installed_version(),
        keys=keys_required(settings, state.keys),
        caller=caller(key),
        base=Base(
            id=settings.base_name,
            fingerprint=state.engine.fingerprint,
            kind="encoder" if is_encoder(state.engine) else "decoder",
            parameters=parameters,
            bytes=2 * parameters,
        ),
        memory=memory,
        running=engine.running,
        waiting=engine.waiting,
        cache_used=engine.cache_used,
        max_upload_bytes=settings.max_upload_bytes,
        clock_s=request.state.arrived,
        counts={model: count for model, count in counted.items() if may_see(key, model)},
    )


def caller(key: Key | None) -> Caller:
    """Without keys everybody is an admin."""
    if key is None:
        return Caller(None, "admin", None)
    return Caller(key.name, key.role, None if key.models is None else list(key.models))


def may_see(key: Key | None, model: str) -> bool:
    """An admin sees every model; others those that they may ask."""
    return key is None or key.role == "admin" or key.may_use(model)


@cache
def parameter_count(base: str) -> int:
    """Numbers in the base's weights, a tied pair counted once; of headers, nothing is loaded."""
    checkpoint = open_checkpoint(base)
    return sum(prod(checkpoint.shape(name)) for name in checkpoint.names)


def counts(metrics: Metrics) -> dict[str, Counts]:
    """What Prometheus would be told, by model."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    sources = (
        ("in_flight", metrics.in_flight, ""),
        ("requests", metrics.whole, "_count"),
        ("request_s", metrics.whole, "_sum"),
        ("first_tokens", metrics.first_token, "_count"),
        ("first_token_s", metrics.first_token, "_sum"),
        ("tokens", metrics.generation_tokens, "_total"),
        ("prompt_tokens", metrics.prompt_tokens, "_total"),
    )
    for field, metric, ending in sources:
        for model, value in _values(metric, ending):
            found[model][field] = value
    return {
        model: Counts(
            in_flight=int(values["in_flight"]),
            requests=int(values["requests"]),
            request_s=values["request_s"],
            first_tokens=int(values["first_tokens"]),
            first_token_s=values["first_token_s"],
            tokens=int(values["tokens"]),
            prompt_tokens=int(values["prompt_tokens"]),
        )
        for model, values in sorted(found.items())
    }


def _values(metric: MetricWrapperBase, ending: str) -> Iterator[tuple[str, float]]:
    for family in metric.collect():
        for sample in family.samples:
            if sample.name == family.name + ending:
                yield sample.labels["model_name"], sample.value
