"""The base's own product for the few rows of a serving batch: ``python benchmarks/base_product.py``.

For layers of SmolLM2 and of a 7 B model, at 1 to 64 rows: ``F.linear``, oneDNN with packed weights, the transposed
product, and the kernels' own in float32, bfloat16 and int8. Every shape has several weights that take turns, so that
each comes from memory, as it does in a model. Writes results/base_product.jsonl and a plot.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn.functional import linear

from deltaserve.kernels import dispatch
from deltaserve.kernels.weights import Weight, quantised
from kernels import machine, read_bandwidth, spread, timed

SHAPES = ((4096, 4096), (49152, 576), (1536, 576), (576, 1536), (576, 576))
ROWS = (1, 4, 16, 32, 64)
GOALS = {1: 1.3, 4: 2.3, 16: 1.8}
BYTES = 2 << 27
"""Of all weights of a shape together: far more than the caches hold."""

Run = Callable[[Tensor, int], object]


class Contest:
    """Products of one shape; ``runs[name](x, i)`` with the i-th weight."""

    def __init__(self, backend: dispatch.Backend, shape: tuple[int, int], rows: int) -> None:
        self.count = max(2, min(40, BYTES // (4 * shape[0] * shape[1])))
        self.weights = [torch.randn(shape) for _ in range(self.count)]
        halves = [weight.bfloat16() for weight in self.weights]
        self.runs: dict[str, Run] = {
            "F.linear": lambda x, i: linear(x, self.weights[i]),
            "transposed": lambda x, i: torch.mm(self.weights[i], x.T),
            "own float32": self.own(backend, [Weight(weight) for weight in self.weights]),
            "own bfloat16": self.own(backend, [Weight(weight) for weight in halves]),
            "own int8": self.own(backend, [quantised(weight) for weight in self.weights]),
            "F.linear bfloat16": lambda x, i: linear(x.bfloat16(), halves[i]),
        }
        if torch.backends.mkldnn.is_available():
            packed = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in self.weights]
            self.runs["oneDNN packed"] = lambda x, i: torch.ops.mkldnn._linear_pointwise(
                x, packed[i], None, "none", [], ""
            )

    @staticmethod
    def own(backend: dispatch.Backend, weights: list[Weight]) -> Run:
        products = [backend.product_of(weight) for weight in weights]

        def run(x: Tensor, i: int) -> Tensor:
            y = torch.empty(len(x), len(weights[i].values))
            products[i](x, weights[i], y)
            return y

        return run

    def check(self, x: Tensor) -> None:
        """No speed is reported of a wrong result."""
        expected = x.double() @ self.weights[0].double().T
        for name, run in self.runs.items():
            got = run(x, 0)
            got = got.T if name == "transposed" else got
            if (
                not (got.double() - expected).norm()
                <= (0.02 if "8" in name or "16" in name else 1e-5) * expected.norm()
            ):
                sys.exit(f"{name} is wrong at {tuple(expected.shape)}; nothing is reported")


def measure(backend: dispatch.Backend, shape: tuple[int, int], rows: int, rounds: int) -> list[dict]:
    contest, x = Contest(backend, shape, rows), torch.randn(rows, shape[1])
    contest.check(x)
    times: dict[str, list[float]] = {name: [] for name in contest.runs}
    for _ in range(max(2, rounds // contest.count)):
        for name, run in contest.runs.items():
            times[name] += [timed(lambda i=i, run=run: run(x, i)) for i in range(contest.count)]
    size = 4 * shape[0] * shape[1]
    return [
        {"row": "product", "what": name, "shape": shape, "rows": rows, "us": spread(values), "repeats": len(values)}
        | {"float32_gb_per_s": round(size / 1000 / spread(values)["median"], 1)}
        for name, values in times.items()
    ]


def goals(rows: list[dict]) -> list[dict]:
    median = {(tuple(r["shape"]), r["rows"], r["what"]): r["us"]["median"] for r in rows if r["row"] == "product"}
    return [
        {
            "row": "goal",
            "name": f"{shape[0]}x{shape[1]}, {count} rows, F.linear against own float32",
            "value": round(median[shape, count, "F.linear"] / median[shape, count, "own float32"], 2),
            "limit": limit,
            "better": "higher",
            "unit": "x",
        }
        for shape in SHAPES[:2]
        for count, limit in GOALS.items()
    ]


def plot(rows: list[dict], path: Path) -> None:
    figure, panels = plt.subplots(1, len(SHAPES), figsize=(3.4 * len(SHAPES), 3.6))
    for panel, shape in zip(panels, SHAPES, strict=True):
        mine = [row for row in rows if row["row"] == "product" and tuple(row["shape"]) == shape]
        for name in dict.fromkeys(row["what"] for row in mine):
            line = [(row["rows"], row["us"]["median"] / 1000) for row in mine if row["what"] == name]
            panel.plot(*zip(*line, strict=True), marker="o", markersize=3, label=name)
        panel.set(title=f"{shape[0]} x {shape[1]}", xlabel="rows", xscale="log", yscale="log")
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=40, help="timings of each product, at least")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "base_product.jsonl")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    backend = dispatch.backend(arguments.backend)
    rows = [machine(backend, read_bandwidth())]
    for shape in SHAPES:
        for count in ROWS:
            rows += measure(backend, shape, count, arguments.rounds)
        print(f"{shape} measured", file=sys.stderr)
    rows += goals(rows)
    arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot(rows, arguments.output.with_suffix(".png"))
    for row in rows:
        if row["row"] == "goal":
            print(f"{row['name']}: {row['value']} {row['unit']} (limit {row['limit']}, {row['better']} is better)")


if __name__ == "__main__":
    main()
