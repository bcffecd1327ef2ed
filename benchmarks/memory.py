"""Peak memory of compressing a checkpoint of 1.1 billion parameters, and of measuring what came out, by layers.

``python benchmarks/memory.py``: base and fine-tune (bfloat16, a shard a layer, with the sizes of TinyLlama-1.1B) are
generated into a temporary folder: 4.4 GB of disk. Each work has a process of its own. Compressing may take four of the
largest tensor in float32 and twice the artifact; measuring four of the largest tensor (two layers are less here) and 4
bytes for each scored token and word. Writes results/memory.jsonl; what is there is not measured again.
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

SAMPLES, TOKENS = 4, 128
"""Of the text that is run."""

BEGIN = """
import sys
from pathlib import Path
import torch
from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.fine_tune import open_fine_tune
from deltaserve.delta_store.profile import Profile
from deltaserve.delta_store.quality import Judge
from deltaserve.delta_store.running.layers import Layerwise
from deltaserve.delta_store.text import Sample
torch.set_num_threads(1)
def size(field):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
def measure(base, fine, out, profile, samples, tokens):
    checkpoint, texts = open_checkpoint(base), [Sample(tuple(range(i, i + tokens + 1))) for i in range(samples)]
    Judge(checkpoint, open_fine_tune(fine, checkpoint), texts, Layerwise()).quality(open_artifact(out), profile)
warm, base, fine, profile, out = map(Path, sys.argv[1:6])
compress(warm, warm, warm / "out", method="dare", measure=False)  # everything imported, nothing large read
measure(warm, warm, warm / "out", None, 1, 8)
before = size("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to now; ru_maxrss begins at the parent's
"""
END = """
print(size("VmHWM") - before)
"""
COMPRESS = 'compress(base, fine, out, method="weighted", profile=profile, measure=False)'
MEASURE = f"measure(base, fine, out, Profile.open(profile), {SAMPLES}, {TOKENS})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made; by default a temporary folder")
    torch.set_num_threads(1)
    rows = Rows("memory", "python benchmarks/memory.py")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        pair = Pair(Path(folder))
        compressing = rows.once({"row": "setting", "setting": "weighted, 1.1 billion parameters"}, pair.compress)
        measuring = rows.once({"row": "setting", "setting": "measured by layers, 1.1 billion parameters"}, pair.measure)
    bounds = {
        "peak memory over four of the largest tensor in float32 and twice the artifact": compressing,
        "peak memory of measuring over four of the largest tensor in float32 and all scored words": measuring,
    }
    shares = {name: row["peak_bytes"] / row["allowed_bytes"] for name, row in bounds.items()}
    rows.end([goal(name, share, 1.0, "lower", "share") for name, share in shares.items()])


class Pair:
    """Base and fine-tune in ``folder``, made when they are first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def compress(self) -> dict[str, float]:
        facts = self._run(COMPRESS)
        artifact = (self.folder / "out").stat().st_size
        allowed = 4 * facts["largest_tensor_bytes"] + 2 * artifact
        return {**facts, "artifact_bytes": artifact, "allowed_bytes": allowed}

    def measure(self) -> dict[str, float]:
        if not (self.folder / "out").exists():
            self._run(COMPRESS)
        facts = self._run(MEASURE)
        allowed = 4 * facts["largest_tensor_bytes"] + 4 * SAMPLES * TOKENS * SIZES["vocab_size"]
        return {**facts, "scored_tokens": SAMPLES * TOKENS, "allowed_bytes": allowed}

    def _run(self, work: str) -> dict[str, float]:
        """What the work took, in a process of its own, and the sizes of the checkpoint."""
        base, fine, warm = self.folder / "base", self.folder / "fine", self.folder / "warm"
        if not warm.exists():
            generate(base, 0.0)
            generate(fine, STEP)
            small = SIZES | {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
            LlamaForCausalLM(LlamaConfig(**small)).save_pretrained(warm)
        checkpoint = open_checkpoint(base)
        numbers = [torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names]
        paths = (warm, base, fine, even_profile(self.folder, base), self.folder / "out")
        command = [sys.executable, "-c", BEGIN + work + END, *map(str, paths)]
        began = time.perf_counter()
        used = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        return {
            "parameters": sum(numbers),
            "checkpoint_bytes": 2 * sum(numbers),
            "largest_tensor_bytes": 4 * max(numbers),
            "peak_bytes": used,
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
