"""The same input and seed give the same file: twice here, and on every machine."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import fine_tuned, save, tiny_llama

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.fingerprint import fingerprint
from deltaserve.delta_store.profile import file_name, write_profile

GOLDEN = {
    "dare": "be37641432c8f8acd0bcacb9fd263b7be6200839d1784e4b771403ec270dd202",
    "weighted": "327d73dcc5baa3047cedd0afa417f3f3fa6196be531d981c5f16441d3ac89d93",
    "lossless": "e74352fdf7a2b79e92ec45522ddfcc645f8c2d0f0c9037ffc3a3e465cec3bbd0",
}
"""SHA-256 of the tensors' bytes and the table of parts. A change here is a change of what files hold."""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def exact_base(folder: Path, seed: int) -> Path:
    """Numbers of whole eighths, so that no machine rounds them; the embedding is the same for every seed."""
    save(tiny_llama(), folder)
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        start = torch.randint(-64, 64, tensor.shape, generator=generator) / 8
        change = torch.randint(-8, 8, tensor.shape, generator=generator) / 8
        tensors[name] = start + (0 if "embed" in name else seed * change)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def content_hash(path: Path) -> str:
    """Of all that a reader decodes; the manifest's provenance names this version and is left out."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    manifest = json.loads(json.loads(data[8:start])["__metadata__"]["deltaserve"])
    return hashlib.sha256(json.dumps(manifest["parts"]).encode() + data[start:]).hexdigest()


@pytest.mark.parametrize("method", GOLDEN)
def test_golden_bytes(method: str, tmp_path: Path) -> None:
    """The lossless hash also depends on zstd, whose version constraints.txt pins."""
    base, fine = exact_base(tmp_path / "base", 0), exact_base(tmp_path / "fine", 1)
    checkpoint = open_checkpoint(base)
    weights = {name: checkpoint.shape(name)[1] for name in checkpoint.names if len(checkpoint.shape(name)) == 2}
    rms = {str(width): torch.arange(1, width + 1) / width for width in set(weights.values())}
    vector_of = {name: str(width) for name, width in weights.items()}
    profile = write_profile(tmp_path, fingerprint(checkpoint), rms, vector_of, "made by hand")
    compress(
        base,
        fine,
        tmp_path / "out",
        method=method,
        options={} if method == "lossless" else {"drop": 0.75},
        profile=tmp_path / file_name(profile.digest) if method == "weighted" else None,
    )
    assert content_hash(tmp_path / "out") == GOLDEN[method]


@pytest.mark.parametrize("method", GOLDEN)
def test_the_same_input_and_seed_give_the_same_file(method: str, tmp_path: Path) -> None:
    base, fine = save(tiny_llama(), tmp_path / "base"), save(fine_tuned(tiny_llama()), tmp_path / "fine")
    digests = [compress(base, fine, tmp_path / name, method=method).digest for name in ("one", "other")]
    assert digests[0] == digests[1]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
