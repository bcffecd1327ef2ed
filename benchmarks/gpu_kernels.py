"""What a variant costs over the base on a GPU, layer by layer, and what swapping one in costs.

    python benchmarks/gpu_kernels.py [--quick] [--output benchmarks/results/gpu_kernels.jsonl]

First every codec and block size is compared with the oracle on the device; nothing is timed if one is wrong. ``us`` is
between CUDA events around one eager call, right after a ``F.linear`` of the same shape, and so holds what Python cannot
launch in time. ``graph_us`` is what a call adds to a CUDA graph of such ``F.linear``: what a captured decode step pays;
``share_percent`` is that over the ``F.linear``. Shapes, densities and batches are those of ``kernels.py``.
"""

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from deltaserve.kernels import dispatch, reference
from deltaserve.kernels.codes import float_codes
from deltaserve.kernels.parts import Delta, Dense, LowRank, Rows
from deltaserve.kernels.segments import BASE, Segments

# by its path: a module named `kernels` would be taken for the package of that name that transformers looks for
_spec = importlib.util.spec_from_file_location("cpu_kernels_benchmark", Path(__file__).with_name("kernels.py"))
cpu = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cpu)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest relative root-mean-square error, as in the tests."""
CALLS = 20
"""In one CUDA graph."""

Run = Callable[[], object]


class Timer:
    """Microseconds, by CUDA events."""

    def eager(self, before: Run, run: Run) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before()
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1000 * start.elapsed_time(end)

    def graphed(self, before: Run, run: Run | None, rounds: int) -> list[float]:
        """Of one ``before`` and ``run``, by round."""
        before()
        if run:
            run()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                before()
                if run:
                    run()
        graph.replay()
        return [self.eager(lambda: None, graph.replay) / CALLS for _ in range(rounds)]


def must_be_close(got: Tensor, expected: Tensor, what: str) -> None:
    error = (got.double() - expected.to(got.device)).norm() / expected.norm().clamp_min(1e-30)
    if not error <= TOLERANCE[got.dtype]:
        sys.exit(f"{what} is wrong, its relative error is {error:.1e}; nothing is reported")


def mixed_delta(shape: tuple[int, int], block: int, codec: str) -> Delta:
    """All kinds of parts together."""
    out, width = shape
    sparse = cpu.random_delta(shape, 0.3, block, codec).parts[0]
    low_rank = LowRank(shape, float_codes(torch.randn(3, width)), float_codes(torch.randn(out, 3), "bf16"))
    rows = Rows(shape, torch.tensor([1, 5, out - 1]), float_codes(torch.randn(3, width)), torch.randn(width), out - 2)
    return Delta(shape, (sparse, low_rank, Dense(shape, float_codes(torch.randn(shape), "bf16")), rows))


def check(
    backend: dispatch.Backend,
    dtypes: Sequence[torch.dtype] = tuple(TOLERANCE),
    codecs: Sequence[str] = cpu.CODECS,
    blocks: Sequence[int] = (1, 4, 8, 16, 32, 64),
) -> None:
    """Every operation against the dense oracle; ends the process at the first that is wrong."""
    shape = (40, 72)
    for dtype in dtypes:
        for codec in codecs:
            for block in blocks:
                for delta in (cpu.random_delta(shape, 0.3, block, codec), mixed_delta(shape, block, codec)):
                    check_delta(backend, delta, dtype, f"{codec}, V = {block}, {len(delta.parts)} parts, {dtype}")


def check_delta(backend: Any, delta: Delta, dtype: torch.dtype, what: str) -> None:
    device, dense = backend.device, reference.unpack(delta).double()
    bank = backend.slots([None, backend.prepare(delta)])
    owners = [BASE] * 2 + [1] * 19 + [0] + [1]  # a full tile, one of three rows, and a single row
    mine = torch.tensor(owners) == 1
    segments = Segments.of([1] * len(owners), owners)
    x = torch.randn(len(owners), delta.shape[1]).to(device, dtype)
    y = torch.randn(len(owners), delta.shape[0]).to(device, dtype)
    expected = y.double().cpu()
    expected[mine] += x.double().cpu()[mine] @ dense.T
    backend.delta_linear_(y, x, bank, segments)
    must_be_close(y, expected, f"delta_linear_ of {what}")

    rows, ids = x.clone(), torch.randint(delta.shape[0], (len(owners),))
    expected = rows.double().cpu()
    expected[mine] += dense[ids[mine]]
    backend.delta_embedding_(rows, ids.to(device), bank, segments)
    must_be_close(rows, expected, f"delta_embedding_ of {what}")

    weight = torch.randn(delta.shape).to(device, dtype)
    before = weight.clone()
    token = backend.swap_in_(weight, delta)
    must_be_close(weight, before.double().cpu() + dense, f"swap_in_ of {what}")
    backend.swap_out_(weight, token)
    if not torch.equal(weight.view(torch.uint8), before.view(torch.uint8)):
        sys.exit(f"swap_out_ of {what} does not restore the weight; nothing is reported")


def check_replay(backend: Any) -> None:
    """A CUDA graph captured while all rows were the base's serves a variant that came later."""
    delta = mixed_delta((40, 72), 16, "int4")
    slots, tiles = backend.slots([None]), backend.tiles(20, 1)
    x, y = torch.randn(20, 72, device=backend.device), torch.zeros(20, 40, device=backend.device)
    backend.delta_linear_(y, x, slots, tiles)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.delta_linear_(y, x, slots, tiles)
    slots[0] = backend.prepare(delta)
    tiles.assign(Segments.of([20], [0]))
    y.zero_()
    graph.replay()
    must_be_close(y, x.double().cpu() @ reference.unpack(delta).double().T, "a replayed graph")


class Layer:
    """Contestants for one shape and batch: ``variants`` variants, each with the same number of rows."""

    def __init__(self, backend: Any, shape: tuple[int, int], tokens: int, variants: int, dtype: torch.dtype) -> None:
        self.backend, self.shape, self.tokens, self.variants, self.dtype = backend, shape, tokens, variants, dtype
        out, width = shape
        self.x, self.y, self.weight = self.random(tokens, width), self.random(tokens, out), self.random(out, width)
        self.segments = Segments.of([tokens // variants] * variants, range(variants))
        self.tiles = backend.tiles(tokens, variants)
        self.tiles.assign(self.segments)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.backend.device)

    def base(self) -> object:
        return linear(self.x, self.weight)

    def delta(self, density: float, block: int, codec: str) -> tuple[Run, int]:
        """The run, and the bytes that it must read. Its slots hold no low rank, which saves a launch."""
        deltas = [cpu.random_delta(self.shape, density, block, codec) for _ in range(self.variants)]
        prepared = [self.backend.prepare(delta) for delta in deltas]
        slots = self.backend.slots(prepared, rank=0)
        self.check(deltas[-1], slots)
        return lambda: self.backend.delta_linear_(self.y, self.x, slots, self.tiles), sum(p.nbytes for p in prepared)

    def check(self, last: Delta, slots: Any) -> None:
        got = torch.zeros_like(self.y)
        self.backend.delta_linear_(got, self.x, slots, self.tiles)
        mine = slice(-(self.tokens // self.variants), None)
        expected = self.x[mine].double() @ reference.unpack(last).to(self.backend.device).double().T
        must_be_close(got[mine], expected, f"delta_linear_ at {self.shape}")

    def lora(self, rank: int = 16) -> Run:
        """Batched over variants, as peft's mixed batches would be at best: no loop, no copies."""
        out, width = self.shape
        a, b = self.random(self.variants, width, rank), self.random(self.variants, rank, out)
        x, y = self.x.view(self.variants, -1, width), self.y.view(self.variants, -1, out)
        return lambda: torch.baddbmm(y, torch.bmm(x, a), b, out=y)

    def merged(self) -> Run:
        """A whole weight for each variant (four of them take turns, to save memory)."""
        weights = self.random(min(self.variants, 4), *self.shape)
        parts = self.x.view(self.variants, -1, self.shape[1])
        return lambda: [linear(part, weights[i % len(weights)]) for i, part in enumerate(parts)]


def measure_layer(layer: Layer, timer: Timer, rounds: int, quick: bool) -> Iterator[dict]:
    runs: dict[str, Run] = {"F.linear": layer.base, "lora": layer.lora(), "merged": layer.merged()}
    setups: dict[str, dict[str, object]] = {"lora": {"rank": 16}}
    for density in (0.01,) if quick else cpu.DENSITIES:
        for block in cpu.BLOCKS:
            for codec in cpu.CODECS if density == 0.01 else ("int4",):
                name = f"delta {density} V={block} {codec}"
                runs[name], size = layer.delta(density, block, codec)
                setups[name] = {"density": density, "V": block, "codec": codec, "bytes": size}
    common = {"shape": layer.shape, "tokens": layer.tokens, "variants": layer.variants}
    common |= {"dtype": str(layer.dtype).removeprefix("torch."), "repeats": rounds}
    for name, run in runs.items():
        alone, together = timer.graphed(layer.base, None, rounds), timer.graphed(layer.base, run, rounds)
        added = [both - median(alone) for both in together]
        yield {
            **{"row": "layer", "what": name.split()[0], **common, **setups.get(name, {})},
            "us": cpu.spread([timer.eager(layer.base, run) for _ in range(rounds)]),
            "graph_us": cpu.spread(added),
            "share_percent": cpu.spread([100 * value / median(alone) for value in added]),
        }


class Swap:
    """A variant of ``shapes``, density 1 %, V = 16, int4, and its weights."""

    def __init__(self, backend: Any, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> None:
        self.backend = backend
        self.weights = [torch.randn(shape).to(backend.device, dtype) for shape in shapes]
        deltas = [cpu.random_delta(shape, 0.01, 16, "int4") for shape in shapes]
        self.prepared = [backend.prepare(delta) for delta in deltas]
        self.dense = [reference.unpack(delta).to(backend.device, dtype) for delta in deltas]
        self.tokens: list[Any] = []

    def swap_in(self) -> None:
        self.tokens = [self.backend.swap_in_(*pair) for pair in zip(self.weights, self.prepared, strict=True)]

    def swap_out(self) -> None:
        for pair in zip(self.weights, self.tokens, strict=True):
            self.backend.swap_out_(*pair)

    def dense_add(self) -> None:
        for weight, values in zip(self.weights, self.dense, strict=True):
            weight.add_(values)


def measure_swap(swap: Swap, timer: Timer, rounds: int) -> Iterator[dict]:
    runs = {"swap in": swap.swap_in, "swap out": swap.swap_out, "dense add": swap.dense_add}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for timed in [False] + [True] * rounds:  # the first round compiles
        for name, run in runs.items():
            value = timer.eager(lambda: None, run)
            if timed:
                times[name].append(value)
    dtype = str(swap.weights[0].dtype).removeprefix("torch.")
    for name, values in times.items():
        yield {"row": "swap", "what": name, "dtype": dtype, "us": cpu.spread(values), "repeats": rounds}


def goals(rows: list[dict]) -> Iterator[dict]:
    """What the kernels aim at, met or not."""

    def best(key: str, **wanted: object) -> float:
        return min(row[key]["median"] for row in rows if all(row.get(name) == value for name, value in wanted.items()))

    def goal(name: str, value: float, better: str) -> dict:
        return {"row": "goal", "name": name, "value": round(value, 3), "limit": 1, "better": better, "unit": "x"}

    for tokens, variants in ((1, 1), (8, 1), (16, 16)):
        batch = {"shape": cpu.LARGE, "tokens": tokens, "variants": variants, "dtype": "bfloat16"}
        ours = best("graph_us", what="delta", density=0.01, V=16, **batch)
        name = f"4096x4096, {variants} variants, {tokens} tokens, in a graph, against LoRA r = 16"
        yield goal(name, ours / best("graph_us", what="lora", **batch), "lower")
    swap_in, dense_add = (best("us", row="swap", what=what, dtype="bfloat16") for what in ("swap in", "dense add"))
    yield goal("dense add against swap in", dense_add / swap_in, "higher")


def machine() -> dict:
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "row": "setup",
        "gpu": properties.name,
        "gpu_gb": round(properties.total_memory / 1e9, 1),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "backend": "triton",
        "seed": 0,
        "commit": commit.stdout.strip(),
        "command": "python " + " ".join(sys.argv),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="density 1 %%, no 4096x11008, no 128 tokens, bf16 only")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu_kernels.jsonl")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a GPU, and torch sees none")
    backend, timer, quick = dispatch.backend("triton"), Timer(), arguments.quick
    if backend.interpreted:
        sys.exit("TRITON_INTERPRET is set: times of Triton's interpreter would mean nothing")
    torch.manual_seed(0)
    check(backend)
    check_replay(backend)
    print("every operation agrees with the oracle", file=sys.stderr)
    rounds = 11 if quick else 25
    rows = [machine()]
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16):
        for shape in cpu.SHAPES:
            for tokens, variants in [*((tokens, 1) for tokens in cpu.TOKENS), (16, 16)]:
                if quick and (tokens == 128 or shape == (4096, 11008)):
                    continue
                rows += measure_layer(Layer(backend, shape, tokens, variants, dtype), timer, rounds, quick)
                print(f"{dtype}, {shape}, {tokens} tokens of {variants} variants measured", file=sys.stderr)
        rows += measure_swap(Swap(backend, cpu.SMOLLM2, dtype), timer, rounds)
    rows += goals(rows)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        if row["row"] == "goal":
            print(f"{row['name']}: {row['value']} {row['unit']} (limit {row['limit']}, {row['better']} is better)")


if __name__ == "__main__":
    main()
