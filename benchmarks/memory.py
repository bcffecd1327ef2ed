"""Peak memory of compressing a checkpoint of 1.1 billion parameters: ``python benchmarks/memory.py``.

Base and fine-tune (bfloat16, a shard a layer, with the sizes of TinyLlama-1.1B) are generated into a temporary folder:
4.4 GB of disk. They are compressed in a process of its own, whose resident memory may grow by four of the largest
tensor in float32 and twice the artifact. Writes results/memory.jsonl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from evidence import Rows, goal
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.fingerprint import fingerprint
from deltaserve.delta_store.profile import file_name, write_profile

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
STEP = 3e-4
"""Standard deviation of the delta."""

COMPRESS = """
import sys
from pathlib import Path
import torch
from deltaserve.delta_store.compress import compress
torch.set_num_threads(1)
def size(field):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
warm, base, fine, profile, out = map(Path, sys.argv[1:])
compress(warm, warm, out, method="dare", measure=False)  # everything imported, nothing large read
before = size("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to now; ru_maxrss begins at the parent's
compress(base, fine, out, method="weighted", profile=profile, measure=False)
print(size("VmHWM") - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made; by default a temporary folder")
    torch.set_num_threads(1)
    rows = Rows("memory", "python benchmarks/memory.py")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        row = rows.once(
            {"row": "setting", "setting": "weighted, 1.1 billion parameters"}, lambda: measure(Path(folder))
        )
    name = "peak memory over four of the largest tensor in float32 and twice the artifact"
    rows.end([goal(name, row["peak_bytes"] / row["allowed_bytes"], 1.0, "lower", "share")])


def measure(folder: Path) -> dict[str, float]:
    base, fine = generate(folder / "base", 0.0), generate(folder / "fine", STEP)
    warm = folder / "warm"
    LlamaForCausalLM(
        LlamaConfig(**SIZES | {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 64})
    ).save_pretrained(warm)
    checkpoint = open_checkpoint(base)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names}
    command = [sys.executable, "-c", COMPRESS, warm, base, fine, even_profile(folder, base), folder / "out"]
    began = time.perf_counter()
    used = int(subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout)
    numbers = [torch.Size(shape).numel() for shape in shapes.values()]
    artifact = (folder / "out").stat().st_size
    return {
        "parameters": sum(numbers),
        "checkpoint_bytes": 2 * sum(numbers),
        "largest_tensor_bytes": 4 * max(numbers),
        "artifact_bytes": artifact,
        "peak_bytes": used,
        "allowed_bytes": 4 * 4 * max(numbers) + 2 * artifact,
        "seconds": time.perf_counter() - began,
    }


def generate(folder: Path, step: float) -> Path:
    """All layers have the numbers of one random draw; ``step`` is the standard deviation of what is added to them."""
    config = LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"], dtype=torch.bfloat16)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    first = {
        name: draw(shape, step) for name, shape in shapes.items() if ".layers." not in name or ".layers.0." in name
    }
    index = {}
    for layer in tqdm(range(-1, config.num_hidden_layers), desc=folder.name):
        names = [name for name in shapes if (f".layers.{layer}." in name if layer >= 0 else ".layers." not in name)]
        tensors = {name: first[name.replace(f".layers.{layer}.", ".layers.0.")] for name in names}
        file = f"model-{layer + 1:05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    total = 2 * sum(shape.numel() for shape in shapes.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def draw(shape: torch.Size, step: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape.numel())
    base = 0.02 * torch.randn(shape, generator=generator)
    return (base + step * torch.randn(shape, generator=generator)).bfloat16()


def even_profile(folder: Path, base: Path) -> Path:
    """A profile in which all inputs are equally strong: measuring one would load the model."""
    checkpoint = open_checkpoint(base)
    widths = {name: checkpoint.shape(name)[1] for name in checkpoint.names if "proj" in name}
    rms = {str(width): torch.ones(width) for width in set(widths.values())}
    vector_of = {name: str(width) for name, width in widths.items()}
    profile = write_profile(folder, fingerprint(checkpoint), rms, vector_of, "even, for a benchmark of memory")
    return folder / file_name(profile.digest)


if __name__ == "__main__":
    main()
