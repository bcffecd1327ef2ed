"""The GPU benchmark, as far as it runs without a GPU: its correctness check, its contestants, its rows."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deltaserve.kernels import dispatch

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("gpu_kernels_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class WallClock:
    """Stands in for CUDA events, which the interpreter does not have."""

    def eager(self, before, run):
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)

    def graphed(self, before, run, rounds):
        return [self.eager(None, before) + (self.eager(None, run) if run else 0) for _ in range(rounds)]


def test_its_check_passes_what_is_right(benchmark):
    benchmark.check(dispatch.backend("triton"), (torch.bfloat16,), ("int4",), (1, 16))


@pytest.mark.parametrize("operation", ["delta_linear_", "delta_embedding_", "swap_in_", "swap_out_"])
def test_its_check_stops_at_what_is_wrong(benchmark, operation, monkeypatch):
    triton = dispatch.backend("triton")
    monkeypatch.setattr(triton, operation, lambda *a: None)
    with pytest.raises(SystemExit, match=f"{operation} of bf16, V = 4"):
        benchmark.check(triton, (torch.float32,), ("bf16",), (4,))


def test_every_contestant_runs_and_gets_a_row(benchmark, monkeypatch):
    triton, large = dispatch.backend("triton"), (32, 48)
    monkeypatch.setattr(benchmark.cpu, "LARGE", large)
    monkeypatch.setattr(benchmark.cpu, "CODECS", ("int4",))
    monkeypatch.setattr(benchmark.cpu, "BLOCKS", (16,))
    rows = []
    for tokens, variants in ((1, 1), (8, 1), (16, 16)):
        layer = benchmark.Layer(triton, large, tokens, variants, torch.bfloat16)
        rows += benchmark.measure_layer(layer, WallClock(), 2, quick=True)
    rows += benchmark.measure_swap(benchmark.Swap(triton, [large, (16, 20)], torch.bfloat16), WallClock(), 2)
    rows += benchmark.goals(rows)
    rows = [json.loads(json.dumps(row)) for row in rows]
    assert {row["what"] for row in rows if row["row"] == "layer"} == {"F.linear", "lora", "merged", "delta"}
    assert {row["what"] for row in rows if row["row"] == "swap"} == {"swap in", "swap out", "dense add"}
    assert sum(row["row"] == "goal" for row in rows) == 4
    assert all({"median", "p20", "p80"} <= row["graph_us"].keys() for row in rows if row["row"] == "layer")


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    output = tmp_path / "rows.jsonl"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--output", str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "This benchmark needs a GPU, and torch sees none\n"
    assert not output.exists()
