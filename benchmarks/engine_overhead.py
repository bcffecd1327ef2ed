"""What the engine costs beyond the model: ``python benchmarks/engine_overhead.py BASE [--minutes 5]``.

BASE is a checkpoint's folder (the demo's: deploy/demo/base.py prints it). In process, without HTTP, float32. A decode
step of the engine, from one token of all requests to the next, against one forward of transformers over as many rows
with as many keys, with a static and, where it is not too large to be copied each step, a dynamic cache; ``over_bare``
is over the faster of the two. Keys are random numbers: prompts are admitted without being computed. A prefill is the
time to the first token against the forward of the same prompts. Tokens a second: requests of 20 tokens that write 32,
against ``generate`` of the same batch. Within a case all take turns, as often as its share of the time allows. Writes
results/engine_overhead.jsonl.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from serving import spread
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from deltaserve.kernels import dispatch
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.limits import EngineLimits
from deltaserve.server.engine.requests import Sampling
from kernels import machine, read_bandwidth

DECODES = [(requests, context) for context in (128, 1024, 2048) for requests in (1, 4, 16, 64)]
PREFILLS = [(1, 128), (4, 128), (1, 1024)]
THROUGHPUTS = (1, 4, 16)
STEPS = 6
COPIED = 32768
"""Tokens of a dynamic cache at most: it copies all its keys in every step."""
PROMPT, NEW = 20, 32
BATCH_TOKENS = 2048

Row = dict[str, Any]


class Turns:
    """Rounds of each case: the first one warms up, at least one more, at most ``most``, until its share is used up."""

    def __init__(self, seconds: float, cases: int, most: int, progress: Progress) -> None:
        self._end, self._cases, self._most = time.perf_counter() + seconds, cases, most
        self._progress, self._bar = progress, progress.add_task("", total=cases)

    def rounds(self, name: str) -> Iterator[int]:
        self._progress.update(self._bar, description=name)
        start = time.perf_counter()
        share = max(0.0, self._end - start) / max(1, self._cases)
        for round_ in range(self._most + 1):
            begun = time.perf_counter()
            yield round_
            now = time.perf_counter()
            if round_ and now + (now - begun) > start + share:
                break
        self._cases -= 1
        self._progress.advance(self._bar)


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


def times_of(engine: Engine, asked: Sequence[list[int]], tokens: int) -> list[list[float]]:
    async def all_at_once() -> list[list[float]]:
        return await asyncio.gather(*(ask(engine, prompt, tokens) for prompt in asked))

    return asyncio.run(all_at_once())


def engine_step(engine: Engine, requests: int, context: int) -> float:
    """Milliseconds a decode step once all requests decode; they are cancelled after ``STEPS`` of them."""
    admission = -(-requests * context // BATCH_TOKENS) + 2
    sampling = Sampling(max_tokens=admission + STEPS + 2, temperature=0, ignore_eos=True)

    async def steps() -> list[float]:
        streams = [await engine.submit(prompt, None, sampling) for prompt in prompts(requests, context)]
        for stream in streams:
            await anext(stream)
        begun = len(streams[0].times)
        async for _ in streams[0]:
            if len(streams[0].times) > begun + STEPS + 1:
                break
        for stream in streams:
            stream.cancel()
            async for _ in stream:
                pass
        return list(streams[0].times[begun : begun + STEPS + 1])

    with Admitted(engine, requests):
        times = asyncio.run(steps())
    return (times[-1] - times[0]) * 1000 / (len(times) - 1)


class Bare:
    """One forward after the other, of rows that have ``context`` random keys each."""

    def __init__(self, model: Any, requests: int, context: int, *, static: bool) -> None:
        config = model.config
        self._cache: Any = StaticCache(config, max_cache_len=context + 32) if static else DynamicCache(config=config)
        keys = torch.randn(1, config.num_key_value_heads, context, config.head_dim).expand(requests, -1, -1, -1)
        for layer in range(config.num_hidden_layers):
            self._cache.update(keys, keys, layer)
        self._model, self._ids = model, torch.full((requests, 1), 100)
        self._position = context

    @torch.inference_mode()
    def step(self) -> float:
        start = time.perf_counter()
        positions = torch.full_like(self._ids, self._position)
        self._model(self._ids, position_ids=positions, past_key_values=self._cache, use_cache=True)
        self._position += 1
        return (time.perf_counter() - start) * 1000

    def steps(self) -> float:
        return median(self.step() for _ in range(3))


def decode_row(engine: Engine, model: Any, turns: Turns, requests: int, context: int) -> Row:
    cases: dict[str, Callable[[], float]] = {"engine": lambda: engine_step(engine, requests, context)}
    cases["static"] = Bare(model, requests, context, static=True).steps
    if requests * context <= COPIED:
        cases["dynamic"] = Bare(model, requests, context, static=False).steps
    times = taken(turns, f"decode {requests} x {context}", cases)
    bare = min((name for name in times if name != "engine"), key=lambda name: median(times[name]))
    return {
        **{"row": "decode", "requests": requests, "context": context, "repeats": len(times["engine"])},
        **{f"{name}_ms": spread(values) for name, values in times.items()},
        **{"over_bare": ratios(times["engine"], times[bare]), "bare": bare},
    }


def prefill_row(engine: Engine, model: Any, turns: Turns, requests: int, context: int) -> Row:
    asked = prompts(requests, context)

    def engine_prefill() -> float:
        """Milliseconds to the last first token; prompts differ each time, so that none is in the cache."""
        asked[:] = [[token + 3 for token in prompt] for prompt in asked]
        start = time.perf_counter()
        return (max(one[0] for one in times_of(engine, asked, 1)) - start) * 1000

    @torch.inference_mode()
    def bare_prefill() -> float:
        start = time.perf_counter()
        model(torch.tensor(asked), use_cache=True, logits_to_keep=1)
        return (time.perf_counter() - start) * 1000

    times = taken(turns, f"prefill {requests} x {context}", {"engine": engine_prefill, "bare": bare_prefill})
    return {
        **{"row": "prefill", "requests": requests, "context": context, "repeats": len(times["engine"])},
        **{f"{name}_ms": spread(values) for name, values in times.items()},
        "over_bare": ratios(times["engine"], times["bare"]),
    }


def throughput_row(engine: Engine, model: Any, turns: Turns, requests: int) -> Row:
    asked = prompts(requests, PROMPT)

    def engine_tokens() -> float:
        start = time.perf_counter()
        times_of(engine, asked, NEW)
        return requests * NEW / (time.perf_counter() - start)

    @torch.inference_mode()
    def generated() -> float:
        ids = torch.tensor(asked)
        start = time.perf_counter()
        every = torch.ones_like(ids)
        model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, attention_mask=every)
        return requests * NEW / (time.perf_counter() - start)

    rates = taken(turns, f"throughput {requests}", {"engine": engine_tokens, "generate": generated})
    return {
        **{"row": "throughput", "requests": requests, "repeats": len(rates["engine"])},
        **{f"{name}_tokens_s": spread(values) for name, values in rates.items()},
        "over_generate": ratios(rates["engine"], rates["generate"]),
    }


def taken(turns: Turns, name: str, cases: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each case gave in each round, without the first one."""
    found: dict[str, list[float]] = {case: [] for case in cases}
    for round_ in turns.rounds(name):
        for case, measure in cases.items():
            value = measure()
            if round_:
                found[case].append(value)
    return found


def ratios(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    return spread([mine / theirs for mine, theirs in zip(own, other, strict=True)])


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        if row["row"] == "decode":
            name = f"decode step of {row['requests']} requests with {row['context']} tokens, over a bare forward"
            found.append(goal(name, row["over_bare"]["median"], 1.15, "lower"))
        if row["row"] == "throughput":
            name = f"{row['requests']} at once, tokens a second over generate"
            found.append(goal(name, row["over_generate"]["median"], 1.6, "higher"))
    return found


def goal(name: str, value: float, limit: float, better: str) -> dict[str, Any]:
    return {"row": "goal", "name": name, "value": round(value, 3), "limit": limit, "better": better, "unit": "x"}


def room(model: Any) -> int:
    """Tokens whose keys and values fit into memory twice, once in the engine's cache and once in a bare one."""
    config = model.config
    token = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * 4
    return int(0.8 * psutil.virtual_memory().available / (2.3 * token))


def random_keys(engine: Engine) -> None:
    """One block of random numbers all over the cache: to draw gigabytes of them takes minutes."""
    block = torch.randn(4096, *engine._batching.batch_processor.cache.stored[0][0].shape[1:])
    with torch.inference_mode():
        for stored in engine._batching.batch_processor.cache.stored:
            for keys in stored:
                for part in keys.split(len(block)):
                    part.copy_(block[: len(part)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--rounds", type=int, default=5, help="of each case at most")
    parser.add_argument("--minutes", type=float, default=5.0, help="that all cases share")
    parser.add_argument("--largest", type=int, help="requests x context at most; what fits into memory if not given")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "engine_overhead.jsonl")
    arguments = parser.parse_args()
    head = machine(dispatch.backend(), read_bandwidth())
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32, attn_implementation="sdpa").eval()
    largest = min(arguments.largest or room(model), max(requests * context for requests, context in DECODES))
    decodes = [(requests, context) for requests, context in DECODES if requests * context <= largest]
    limits = EngineLimits(
        policy="mixed",
        cache_tokens=int(1.2 * largest) + 8192,  # the library keeps a part free
        max_running=64,
        batch_tokens=BATCH_TOKENS,
    )
    engine = Engine(arguments.base, limits=limits)
    engine.start()
    random_keys(engine)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        cases = len(THROUGHPUTS) + len(decodes) + len(PREFILLS)
        turns = Turns(60.0 * arguments.minutes, cases, arguments.rounds, progress)
        measures = [
            *((throughput_row, (requests,)) for requests in THROUGHPUTS),
            *((prefill_row, size) for size in PREFILLS),
            *((decode_row, size) for size in decodes),
        ]
        rows: list[Row] = []
        for measure, size in measures:
            rows.append(measure(engine, model, turns, *size))
            progress.console.print(json.dumps(rows[-1]), soft_wrap=True, highlight=False)
            arguments.output.write_text("".join(json.dumps(row) + "\n" for row in (head, *rows, *goals(rows))))
    engine.stop()


if __name__ == "__main__":
    main()
