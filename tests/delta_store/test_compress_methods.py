"""Every method through a whole fine-tune: written, opened and merged it is what the method made of each tensor."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import fine_tuned, save, tiny_gpt2, tiny_llama

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.delta import deltas
from deltaserve.delta_store.fine_tune import open_fine_tune
from deltaserve.delta_store.merge import variant_tensors
from deltaserve.delta_store.plain_model import embedding_names
from deltaserve.delta_store.profile import Profile, profile_of
from deltaserve.delta_store.pruning.methods import METHODS
from deltaserve.delta_store.pruning.options import Value
from deltaserve.delta_store.pruning.weights import BaseFacts
from deltaserve.kernels.parts import Delta, Part
from deltaserve.kernels.reference import unpack

UNTUNED = [n for n, row in METHODS.items() if row.for_checkpoints and row.tune is None and n != "lossless"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def options_of(name: str) -> dict[str, Value]:
    """As much dropped as leaves something in so small a model."""
    return {"drop": 0.7} if "drop" in METHODS[name].defaults else {}


@pytest.mark.parametrize(
    ("name", "make"), [*((name, tiny_llama) for name in UNTUNED), ("structural", tiny_gpt2), ("dense", tiny_gpt2)]
)
def test_a_method_survives_write_open_and_merge(name: str, make: type, tmp_path: Path) -> None:
    """Only masks that are drawn from the profile need it again; low rank looks at it and is decoded without."""
    base, fine = save(make(), tmp_path / "base"), save(fine_tuned(make()), tmp_path / "fine")
    receipt = compress(base, fine, tmp_path / "out", method=name, options=options_of(name))
    artifact, checkpoint = open_artifact(tmp_path / "out"), open_checkpoint(base)
    row, profile = METHODS[name], known_profile(tmp_path) if METHODS[name].needs_profile else None
    is_drawn = name in ("weighted", "low-rank-residual", "dense-residual")
    assert receipt.profile == artifact.manifest.profile == (profile.digest if profile and is_drawn else None)
    facts = BaseFacts(profile, embedding_names(checkpoint.architecture), 8)
    merged = dict(variant_tensors(checkpoint, artifact, profile_of(artifact)))
    assert merged.keys() == set(checkpoint.names)
    for change in open_fine_tune(fine, checkpoint).changes():
        encoded = row.function(change, row.options(options_of(name)), facts)
        found = tuple(part for _, part in encoded if isinstance(part, Part))
        delta = unpack(Delta(found[0].shape, found))
        original = checkpoint.read(change.name)
        wanted = original + (delta.T if change.transposed else delta)
        torch.testing.assert_close(merged[change.name], wanted, atol=1e-6, rtol=0)


def known_profile(folder: Path) -> Profile:
    (path,) = (folder / "cache").rglob("profile-*.safetensors")
    return Profile.open(path)


@pytest.mark.parametrize("name", ["weighted", "magnitude", "structural", "low-rank", "dense"])
def test_an_adapter_is_pruned_as_its_product(name: str, tmp_path: Path) -> None:
    base = save(tiny_llama(), tmp_path / "base")
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    compress(base, tmp_path / "adapter", tmp_path / "out", method=name, options=options_of(name))
    artifact = open_artifact(tmp_path / "out")
    assert len(artifact.names) == 4
    merged = dict(variant_tensors(open_checkpoint(base), artifact, profile_of(artifact)))
    whole = model.merge_and_unload().state_dict()
    original = tiny_llama().state_dict()
    kept = torch.cat([(merged[n] - original[n]).flatten() for n in artifact.names])
    full = torch.cat([(whole[n] - original[n]).flatten() for n in artifact.names])
    assert torch.nn.functional.cosine_similarity(kept, full, dim=0) > 0.3


def test_a_head_of_its_own_and_added_rows_survive(tmp_path: Path) -> None:
    """Whatever the method, embeddings and heads are stored by row and rank."""
    model = tiny_llama(tied=False)
    tuned = fine_tuned(model)
    tuned.resize_token_embeddings(67)
    base, fine = save(model, tmp_path / "base"), save(tuned, tmp_path / "fine")
    checkpoint = open_checkpoint(base)
    added = {d.name: d.fine[64:] for d in deltas(checkpoint, open_checkpoint(fine)) if len(d.fine) == 67}
    for name in ("magnitude", "structural", "dense"):
        compress(base, fine, tmp_path / "out", method=name, options=options_of(name))
        artifact = open_artifact(tmp_path / "out")
        for tensor, rows in added.items():
            assert {spec.kind for spec in artifact.specs(tensor)} == {"rows", "low_rank"}
            assert torch.equal(dict(variant_tensors(checkpoint, artifact, None))[tensor][64:], rows)
    assert len(added) == 2
