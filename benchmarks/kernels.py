"""What a variant costs over the base on this machine, layer by layer, and what swapping one in costs.

    python benchmarks/kernels.py [--quick] [--backend auto] [--output benchmarks/results/kernels.jsonl]

Each contestant is timed once right after a ``F.linear`` of the same shape, which leaves the caches as a model would;
its ``share`` is its time over that product's, round by round. Results are checked against the oracle before they are
timed. Run it on a quiet machine, or with OMP_NUM_THREADS below the number of free cores: threads wait for each other.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from statistics import median, quantiles

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

from deltaserve.kernels import dispatch, reference
from deltaserve.kernels.codes import BITS, float_codes, pack_bits
from deltaserve.kernels.parts import Codes, Delta, Sparse
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.weights import Weight

CODECS = ("bf16", "int8", "int4", "int2", "sign")
SHAPES = ((4096, 4096), (4096, 11008), (1536, 576), (576, 576))
DENSITIES = (0.005, 0.01, 0.02, 0.05)
BLOCKS = (1, 4, 16)
TOKENS = (1, 8, 32, 128)
SMOLLM2 = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)] * 30
LARGE = (4096, 4096)

FEWER_ROUNDS = 2e8
"""Products from which one ``F.linear`` takes so long that nine rounds must do."""

Run = Callable[[], object]


def random_delta(shape: tuple[int, int], density: float, block: int, codec: str) -> Delta:
    """A weighted drop: one kept column in each of K strata, a factor a column, a scale for each 64 values."""
    out, width = shape
    blocks, kept = -(-out // block), max(1, round(width * density))
    edges = torch.arange(kept + 1) * width // kept
    columns = (edges[:-1] + (torch.rand(blocks, kept) * edges.diff()).long()).int()
    values = (blocks, kept, block)
    if codec == "bf16":
        codes = float_codes(torch.randn(values), codec)
    else:
        levels = torch.randint(int(codec == "int4"), 2 ** BITS[codec], (prod(values),))
        levels = (levels - 128).clamp(min=-127) if codec == "int8" else levels
        scales = torch.rand(-(-prod(values) // 64)).bfloat16()
        codes = Codes(codec, values, pack_bits(levels, codec), scales, 64)
    return Delta(shape, (Sparse(shape, columns, codes, torch.rand(width) + 0.5),))


def random_csr(shape: tuple[int, int], density: float) -> torch.Tensor:
    """As many kept columns a row as ``random_delta`` has, in torch's layout."""
    columns = random_delta(shape, density, 1, "bf16").parts[0].columns
    starts = torch.arange(shape[0] + 1) * columns.shape[1]
    return torch.sparse_csr_tensor(starts.int(), columns.flatten(), torch.randn(columns.numel()), shape)


def timed(run: Run) -> float:
    """Microseconds."""
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1000


def spread(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    fifths = quantiles(values, n=5)
    return {"median": round(median(values), 3), "p20": round(fifths[0], 3), "p80": round(fifths[3], 3)}


def read_bandwidth() -> float:
    """Bytes a microsecond, reading memory far larger than the caches with all threads."""
    memory = torch.ones(1 << 26)
    return memory.nbytes / min(timed(memory.sum) for _ in range(5))


class Layer:
    """Contestants for one shape and batch: ``variants`` variants, each with the same number of rows."""

    def __init__(self, backend: dispatch.Backend, shape: tuple[int, int], tokens: int, variants: int) -> None:
        self.backend, self.shape, self.tokens, self.variants = backend, shape, tokens, variants
        out, width = shape
        self.x, self.y, self.weight = torch.randn(tokens, width), torch.zeros(tokens, out), torch.randn(out, width)
        self.segments = Segments.of([tokens // variants] * variants, range(variants))

    def base(self) -> object:
        return linear(self.x, self.weight)

    def delta(self, density: float, block: int, codec: str) -> tuple[Run, int]:
        """The run, and the bytes that it must read."""
        deltas = [random_delta(self.shape, density, block, codec) for _ in range(self.variants)]
        bank = [self.backend.prepare(delta) for delta in deltas]
        self.check(deltas, bank)
        size = sum(one.nbytes for one in bank)
        if hasattr(self.backend, "slots"):
            bank = self.backend.slots(bank)
        return lambda: self.backend.delta_linear_(self.y, self.x, bank, self.segments), size

    def check(self, deltas: list[Delta], bank: list[object]) -> None:
        """No speed is reported of a wrong result."""
        got = torch.zeros_like(self.y)
        self.backend.delta_linear_(got, self.x, bank, self.segments)
        rows = self.tokens // self.variants
        for slot in {0, self.variants - 1}:
            mine = slice(slot * rows, (slot + 1) * rows)
            expected = self.x[mine] @ reference.unpack(deltas[slot]).T
            if not (got[mine] - expected).norm() <= 1e-5 * expected.norm():
                sys.exit(f"{self.backend.NAME} gives a wrong result at {self.shape}; nothing is reported")

    def lora(self, rank: int = 16) -> Run:
        """Batched over variants, as peft's mixed batches would be at best: no loop, no copies."""
        out, width = self.shape
        a, b = torch.randn(self.variants, width, rank), torch.randn(self.variants, rank, out)
        x, y = self.x.view(self.variants, -1, width), self.y.view(self.variants, -1, out)
        return lambda: torch.baddbmm(y, torch.bmm(x, a), b, out=y)

    def csr(self, density: float) -> Run:
        """torch's sparse product (MKL), which knows no batch of variants; adding it to y is not even counted."""
        matrices = [random_csr(self.shape, density) for _ in range(self.variants)]
        inputs = self.x.view(self.variants, -1, self.shape[1]).mT.contiguous()
        return lambda: [matrix @ x for matrix, x in zip(matrices, inputs, strict=True)]

    def merged(self) -> Run:
        """A whole weight for each variant (four of them take turns, to save memory)."""
        weights = torch.randn(min(self.variants, 4), *self.shape)
        parts = self.x.view(self.variants, -1, self.shape[1])
        return lambda: [linear(part, weights[i % len(weights)]) for i, part in enumerate(parts)]


def compete(layer: Layer, contestants: dict[str, Run], rounds: int) -> dict[str, tuple[list[float], ...]]:
    """For each contestant, by round: microseconds, per cent of the ``F.linear`` just before, and microseconds again.

    The second time, everything that the contestant needs is still in the caches.
    """
    results: dict[str, tuple[list[float], ...]] = {name: ([], [], []) for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(rounds):
        for name, run in contestants.items():
            base, own, again = timed(layer.base), timed(run), timed(run)
            for values, value in zip(results[name], (own, 100 * own / base, again), strict=True):
                values.append(value)
    return results


def measure_layer(layer: Layer, rounds: int, quick: bool, speed: float) -> Iterator[dict]:
    runs: dict[str, Run] = {"F.linear": layer.base, "lora": layer.lora(), "merged": layer.merged()}
    setups: dict[str, dict[str, object]] = {"lora": {"rank": 16}}
    for density in (0.01,) if quick else DENSITIES:
        runs[f"csr {density}"] = layer.csr(density)
        setups[f"csr {density}"] = {"density": density}
        for block in BLOCKS:
            for codec in CODECS if density == 0.01 else ("int4",):
                name = f"delta {density} V={block} {codec}"
                runs[name], size = layer.delta(density, block, codec)
                setups[name] = {"density": density, "V": block, "codec": codec, "bytes": size}
                setups[name]["limit_us"] = round(size / speed, 2)
    common = {"shape": layer.shape, "tokens": layer.tokens, "variants": layer.variants, "repeats": rounds}
    for name, (times, shares, again) in compete(layer, runs, rounds).items():
        what = {"row": "layer", "what": name.split()[0], **common, **setups.get(name, {})}
        yield {**what, "us": spread(times), "share_percent": spread(shares), "warm_us": spread(again)}


def measure_fused(layer: Layer, rounds: int) -> Iterator[dict]:
    """What deltas add to the base's own product in one call, as the engine makes it; density 1 %, V = 16."""
    backend, x = layer.backend, layer.x
    plain = backend.layers([Weight(layer.weight)], layer.variants)
    for codec in CODECS:
        whole = backend.layers([Weight(layer.weight)], layer.variants)
        deltas = [random_delta(layer.shape, 0.01, 16, codec) for _ in range(layer.variants)]
        for slot, delta in enumerate(deltas):
            whole.install(0, slot, backend.prepare(delta))
        times: dict[str, list[float]] = {"F.linear": [], "base": [], "base and deltas": []}
        runs = {
            "base": lambda: backend.linear(x, plain, None),
            "base and deltas": lambda whole=whole: backend.linear(x, whole, layer.segments),
        }
        for round_ in range(4 * rounds):
            times["F.linear"].append(timed(layer.base))
            for name in sorted(runs, reverse=round_ % 2 == 0):  # the second one finds warmer caches, so they take turns
                times[name].append(timed(runs[name]))
        linear_us, base, both = (times[name] for name in times)
        yield {
            **{
                "row": "fused",
                "shape": layer.shape,
                "tokens": layer.tokens,
                "variants": layer.variants,
                "codec": codec,
            },
            "added_percent": spread([100 * (b - a) / f for f, a, b in zip(linear_us, base, both, strict=True)]),
            "us": {name: spread(values) for name, values in times.items()},
            "repeats": 4 * rounds,
        }


def touched_lines(delta: Delta) -> int:
    """Cache lines of a float32 weight that hold a value of the delta."""
    rows, columns = reference.unpack(delta).nonzero().T
    return len(torch.unique((rows * delta.shape[1] + columns) * 4 // 64))


class Swap:
    """A whole SmolLM2 variant, density 1 %, V = 16, int4, and its float32 weights."""

    def __init__(self, backend: dispatch.Backend) -> None:
        self.backend = backend
        self.weights = [torch.randn(shape) for shape in SMOLLM2]
        self.deltas = [random_delta(shape, 0.01, 16, "int4") for shape in SMOLLM2]
        self.prepared = [delta if backend is reference else backend.prepare(delta) for delta in self.deltas]
        self.dense = [reference.unpack(delta) for delta in self.deltas]
        self.flat = [(values.flatten().nonzero().flatten(), values[values != 0]) for values in self.dense]
        self.token: object = None

    def swap_in(self) -> None:
        self.token = self.backend.swap_in_all_(self.weights, self.prepared)

    def swap_out(self) -> None:
        self.backend.swap_out_all_(self.weights, self.token)

    def index_add(self) -> None:
        for weight, (positions, values) in zip(self.weights, self.flat, strict=True):
            weight.view(-1).index_add_(0, positions, values)

    def dense_add(self) -> None:
        for weight, values in zip(self.weights, self.dense, strict=True):
            weight.add_(values)

    def check(self) -> None:
        before = [weight.clone() for weight in self.weights]
        self.swap_in()
        for weight, old, values in zip(self.weights, before, self.dense, strict=True):
            if not torch.allclose(weight, old + values, atol=1e-5):
                sys.exit(f"{self.backend.NAME} swaps in wrongly; nothing is reported")
        self.swap_out()
        for weight, old in zip(self.weights, before, strict=True):
            if not torch.equal(weight.view(torch.int32), old.view(torch.int32)):
                sys.exit(f"{self.backend.NAME} does not restore the base; nothing is reported")


def measure_swap(backend: dispatch.Backend, rounds: int, speed: float) -> Iterator[dict]:
    swap = Swap(backend)
    swap.check()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file({str(i): weight for i, weight in enumerate(swap.weights)}, path)

        def reload() -> None:
            for name, weight in load_file(path).items():
                swap.weights[int(name)].copy_(weight)

        runs: dict[str, Run] = {
            "swap in": swap.swap_in,
            "swap out": swap.swap_out,
            "index_add_": swap.index_add,
            "dense add": swap.dense_add,
            "safetensors reload": reload,
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(timed(run))
    lines = sum(map(touched_lines, swap.deltas))
    for name, values in times.items():
        yield {"row": "swap", "what": name, "us": spread(values), "repeats": rounds}
    # a line is read and written back on the way in and again on the way out
    yield {"row": "swap", "what": "limit", "us": {"median": round(4 * 64 * lines / speed, 1)}, "touched_lines": lines}


def goals(rows: list[dict]) -> Iterator[dict]:
    """What the kernels aim at, met or not."""

    def values(key: str, **wanted: object) -> list[float]:
        return [row[key]["median"] for row in rows if all(row.get(name) == value for name, value in wanted.items())]

    def goal(name: str, value: float, limit: float, unit: str, better: str = "lower") -> dict:
        return {"row": "goal", "name": name, "value": round(value, 3), "limit": limit, "better": better, "unit": unit}

    one = {"what": "delta", "density": 0.01, "variants": 1}
    for tokens, limit in ((1, 0.4), (8, 0.5), (32, 1.5)):
        costs = values("share_percent", **one, shape=LARGE, tokens=tokens, V=16)
        fused = values("added_percent", row="fused", variants=1, shape=LARGE, tokens=tokens)
        for how, shares in (("beside the base's product", fused), ("in a call of their own", costs)):
            what = f"4096x4096, 1 variant, {tokens} tokens, deltas {how}"
            yield goal(f"{what}, best codec", min(shares), limit, "%")
            yield goal(f"{what}, worst codec", max(shares), 2 * limit, "%")
        unstructured = min(values("us", **one, shape=LARGE, tokens=tokens, V=1))
        csr = min(values("us", what="csr", density=0.01, variants=1, shape=LARGE, tokens=tokens))
        yield goal(f"4096x4096, V = 1, {tokens} tokens, against MKL CSR", unstructured / csr, 0.4, "x")
    for tokens, variants in ((1, 1), (8, 1), (16, 16)):
        batch = {"shape": LARGE, "tokens": tokens, "variants": variants}
        if variants == 16:
            cost = min(values("share_percent", what="delta", density=0.01, V=16, **batch))
            fused = min(values("added_percent", row="fused", **batch))
            yield goal("4096x4096, 16 variants x 1 token, deltas beside the base's product, best codec", fused, 2, "%")
            yield goal("4096x4096, 16 variants x 1 token, deltas in a call of their own, best codec", cost, 2, "%")
        ours, lora = (
            min(values("us", what="delta", density=0.01, V=16, **batch)),
            min(values("us", what="lora", **batch)),
        )
        yield goal(f"4096x4096, {variants} variants, {tokens} tokens, against LoRA r = 16", ours / lora, 1, "x")
    for shape, limit in (((576, 576), 5), ((1536, 576), 4)):
        for tokens in (1, 8):
            cost = min(values("share_percent", **one, shape=shape, tokens=tokens, V=16))
            fused = min(values("added_percent", row="fused", variants=1, shape=shape, tokens=tokens))
            what = f"{shape[0]}x{shape[1]}, 1 variant, {tokens} tokens, deltas"
            yield goal(f"{what} beside the base's product, best codec", fused, limit, "%")
            yield goal(f"{what} in a call of their own, best codec", cost, limit, "%")
    swap = {row["what"]: row["us"]["median"] for row in rows if row["row"] == "swap"}
    yield goal("swap in + out against the limit", (swap["swap in"] + swap["swap out"]) / swap["limit"], 1.5, "x")
    yield goal("dense add against swap in", swap["dense add"] / swap["swap in"], 15, "x", "higher")
    yield goal("safetensors reload against swap in", swap["safetensors reload"] / swap["swap in"], 50, "x", "higher")


def machine(backend: dispatch.Backend, speed: float) -> dict:
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "row": "setup",
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "read_gb_per_s": round(speed / 1000, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": backend.NAME,
        "seed": 0,
        "commit": commit.stdout.strip(),
        "command": "python " + " ".join(sys.argv),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="density 1 %%, no 4096x11008, no 128 tokens, fewer rounds")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "kernels.jsonl")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    backend, quick = dispatch.backend(arguments.backend), arguments.quick
    rounds = 11 if quick else 25
    speed = read_bandwidth()
    rows = [machine(backend, speed)]
    for shape in SHAPES:
        for tokens, variants in [*((tokens, 1) for tokens in TOKENS), (16, 16)]:
            if quick and (tokens == 128 or shape == (4096, 11008)):
                continue
            layer = Layer(backend, shape, tokens, variants)
            few = rounds if tokens * shape[0] * shape[1] < FEWER_ROUNDS else 9
            rows += measure_layer(layer, few, quick, speed)
            rows += measure_fused(layer, few)
            print(f"{shape}, {tokens} tokens of {variants} variants measured", file=sys.stderr)
    rows += measure_swap(backend, rounds, speed)
    rows += goals(rows)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        if row["row"] == "goal":
            print(f"{row['name']}: {row['value']} {row['unit']} (limit {row['limit']}, {row['better']} is better)")


if __name__ == "__main__":
    main()
