"""Peak memory of compressing and of measuring, by a process of its own, on a checkpoint larger than is allowed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save, tiny_llama

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peak memory")

HIDDEN, LAYERS = 2048, 27

SLACK = 44 << 20
"""For what the interpreter and the allocator keep, and for pages of the mapped files."""

BEGIN = """
import sys
import torch
from pathlib import Path
from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.fine_tune import open_fine_tune
from deltaserve.delta_store.pruning import darex
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.quality import Judge
from deltaserve.delta_store.running.layers import Layerwise
from deltaserve.delta_store.running.whole import Whole
from deltaserve.delta_store.text import Sample
torch.set_num_threads(1)
tiny, tiny_out, base, fine, out = sys.argv[1:]
SAMPLES = [Sample(tuple(range(first, 64))) for first in range(2)]
def measure(base, fine, artifact, runner):
    checkpoint = open_checkpoint(base)
    Judge(checkpoint, open_fine_tune(fine, checkpoint), SAMPLES, runner).quality(open_artifact(artifact), None)
def tune(base, fine, artifact, runner):
    checkpoint = open_checkpoint(base)
    darex.minimise = lambda score, smallest: min((0.0, 1.0), key=score)  # two trials take what twenty do
    options = Options(drop=0.98)
    darex.search(checkpoint, open_fine_tune(fine, checkpoint), open_artifact(artifact), SAMPLES, options, runner)
compress(tiny, tiny, Path(tiny_out), method="dare", measure=False)  # everything imported, nothing large read
measure(tiny, tiny, Path(tiny_out), Layerwise())
def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to now; ru_maxrss begins at the parent's
"""
END = """
print(kilobytes("VmHWM") - before)
"""
COMPRESS = 'compress(base, fine, Path(out), method="dare", measure=False)'
MEASURE = "measure(base, fine, Path(out), {runner}())"
TUNE = "tune(base, fine, Path(out), Layerwise())"


class Pair(NamedTuple):
    """Base and fine-tune of 1.02 billion parameters, and how they were compressed. Numbers are bytes, the first two in
    float32."""

    folder: Path
    largest_tensor: int
    layer: int
    stored: int
    compressing_took: int

    @property
    def out(self) -> Path:
        return self.folder / "out"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """In bfloat16, whose float32 copies count: generated shard by shard, and never whole in memory here either."""
    folder = tmp_path_factory.mktemp("pair")
    small = save(tiny_llama(hidden=HIDDEN, layers=1, vocab=64), folder / "base")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS, "dtype": "bfloat16"}))
    shapes = {name: tensor.shape for name, tensor in load_file(small / "model.safetensors").items()}
    fine = folder / "fine"
    fine.mkdir()
    (fine / "config.json").write_bytes((small / "config.json").read_bytes())
    for where, scale in ((small, 0.02), (fine, 0.021)):
        write_layers(where, shapes, scale)
    save(tiny_llama(), folder / "tiny")
    sizes = {name: 4 * shape.numel() for name, shape in shapes.items()}
    layer = sum(size for name, size in sizes.items() if ".0." in name)
    stored = sum(path.stat().st_size for path in small.glob("*.safetensors"))
    return Pair(folder, max(sizes.values()), layer, stored, peak(folder, COMPRESS))


def write_layers(folder: Path, shapes: dict[str, torch.Size], scale: float) -> None:
    """One shard a layer, all layers of one random draw."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    generator = torch.Generator().manual_seed(0)
    drawn = {name: (scale * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shapes.items()}
    weight_map = {}
    for layer in range(LAYERS):
        tensors = {n.replace(".0.", f".{layer}."): t for n, t in drawn.items() if ".0." in n or layer == 0}
        save_file(tensors, folder / f"layer-{layer}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"layer-{layer}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def peak(folder: Path, work: str) -> int:
    """Bytes that the work added to the peak of a process's memory."""
    names = ("tiny", "tiny-out", "base", "fine", "out")
    command = [sys.executable, "-c", BEGIN + work + END, *(str(folder / name) for name in names)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(result.stdout) * 1024


def test_compressing_a_billion_parameters_needs_a_fraction_of_them(pair: Pair) -> None:
    allowed = 4 * pair.largest_tensor + 2 * pair.out.stat().st_size + SLACK
    assert pair.stored > 2e9
    assert 4 * allowed < pair.stored
    assert pair.compressing_took < allowed, (pair.compressing_took, allowed)


def test_measuring_a_billion_parameters_by_layers_needs_two_of_them(pair: Pair) -> None:
    """And it is the layers that do it: the whole model, in float32, needs all of its 4 GB."""
    allowed = 2 * pair.layer + SLACK
    assert 3 * allowed < pair.stored
    used = peak(pair.folder, MEASURE.format(runner="Layerwise"))
    assert used < allowed, (used, allowed)
    assert peak(pair.folder, MEASURE.format(runner="Whole")) > 2 * pair.stored * 0.95


def test_tuning_a_billion_parameters_by_layers_needs_two_of_them(pair: Pair) -> None:
    allowed = 2 * pair.layer + SLACK + (4 << 20)  # both models' layers come and go, of which the allocator keeps more
    used = peak(pair.folder, TUNE)
    assert used < allowed, (used, allowed)
