"""What docs/gpu.md says, where there is no GPU: its example in Triton's interpreter, its commands as far as they go."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running_server import ENVIRONMENT
from tiny_models import save, tiny_llama

ROOT = Path(__file__).parents[1]
SHELL, EXAMPLE, CHECKS = re.findall(r"```(?:sh|python)\n(.*?)```", (ROOT / "docs" / "gpu.md").read_text(), re.S)


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command],
        env=ENVIRONMENT | {"PYTHONPATH": paths} | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )


def test_the_example_computes_what_its_tables_say_after_they_changed() -> None:
    recorded = EXAMPLE.replace("with torch.cuda.graph(graph):", "def replay():").replace("graph.replay()", "replay()")
    assert recorded.count("replay()") == 2
    script = f"""
import torch
from deltaserve.kernels import dispatch, reference
from deltaserve.kernels.codes import float_codes
from deltaserve.kernels.parts import Delta, Dense
from deltaserve.kernels.segments import BASE, Segments
torch.manual_seed(0)
weight = torch.randn(8, 16)
delta = Delta((8, 16), (Dense((8, 16), float_codes(weight)),))
x, y = torch.randn(64, 16), torch.zeros(64, 8)
{recorded}
assert (y[:8] - x[:8] @ weight.T).abs().max() < 1e-4
assert not y[8:].any()
print("right")
"""
    done = run("-c", script, TRITON_INTERPRET="1")
    assert done.stdout == "right\n", done.stderr


def test_its_commands_are_there_and_say_that_there_is_no_gpu(tmp_path: Path) -> None:
    _, serve = SHELL.splitlines()
    words = shlex.split(serve, comments=True)
    assert words[:3] == ["deltaserve", "serve", "org/name"]
    base = save(tiny_llama(), tmp_path / "base", vocab=64)
    served = run("-m", "deltaserve.server.cli", "serve", base, *words[3:], "--device", "cuda", "--store", tmp_path)
    assert served.returncode != 0
    assert re.fullmatch(r"Error: .*cuda.*\n", served.stderr), served.stderr
    commands = [shlex.split(line, comments=True) for line in CHECKS.splitlines()[1:]]
    tests = [file for command in commands if command[:3] == ["python", "-m", "pytest"] for file in command[3:]]
    assert len(tests) == 4
    found = run("-m", "pytest", "--collect-only", "-q", "-n0", *tests)
    assert found.returncode == 0, found.stdout
    assert commands[-1][:2] == ["python", "benchmarks/gpu_kernels.py"]
    measured = run("benchmarks/gpu_kernels.py")
    assert "GPU" in measured.stdout + measured.stderr
    assert "Traceback" not in measured.stderr
