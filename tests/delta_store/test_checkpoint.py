"""Reading checkpoints: what is read equals what transformers reads, and what cannot be read is named."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import fine_tuned, save, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM

from deltaserve.delta_store.checkpoint import Checkpoint, open_checkpoint
from deltaserve.delta_store.delta import deltas
from deltaserve.delta_store.errors import (
    CheckpointError,
    MissingTensors,
    UnsafeCheckpoint,
    UnsupportedCheckpoint,
)
from deltaserve.delta_store.fingerprint import fingerprint


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(), tmp_path_factory.mktemp("clean"))


def as_bin(clean: Path, folder: Path, shards: int = 1) -> Path:
    """The same checkpoint as ``.bin``, in as many shards."""
    folder.mkdir()
    shutil.copy(clean / "config.json", folder)
    items = list(load_file(clean / "model.safetensors").items())
    if shards == 1:
        torch.save(dict(items), folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        torch.save(dict(items[i::shards]), folder / name)
        weight_map |= {key: name for key, _ in items[i::shards]}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def rewritten(clean: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    shutil.copy(clean / "config.json", folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


def assert_equal(one: Checkpoint, other: Checkpoint) -> None:
    assert one.names == other.names
    for name in one.names:
        assert one.dtype(name) == other.dtype(name)
        assert one.shape(name) == other.shape(name) == tuple(one.read(name).shape)
        assert torch.equal(one.read(name), other.read(name))


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tied=False), tiny_gpt2])
def test_names_and_values_are_those_of_transformers(make, tmp_path: Path) -> None:
    model = make()
    checkpoint = open_checkpoint(save(model, tmp_path / "model"))
    parameters = dict(model.named_parameters())
    assert set(checkpoint.names) == set(parameters)
    assert checkpoint.tied == model.config.tie_word_embeddings
    for name, parameter in parameters.items():
        assert torch.equal(checkpoint.read(name), parameter)


def test_shards_read_like_one_file(clean: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(clean)
    sharded = save(model, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert_equal(open_checkpoint(sharded), open_checkpoint(clean))


def test_a_tensor_read_has_a_storage_of_its_own(clean: Path, tmp_path: Path) -> None:
    for folder in (clean, as_bin(clean, tmp_path / "bin")):
        tensor = open_checkpoint(folder).read("model.norm.weight")
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor.zero_()
        assert open_checkpoint(folder).read("model.norm.weight").abs().sum() > 0


class MarkerMaker:
    """Unpickled with everything allowed, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


class Harmless(torch.Tensor):
    pass


def test_b_pickle_weights_1_code_in_a_pickle_does_not_run(clean: Path, tmp_path: Path) -> None:
    folder, marker = as_bin(clean, tmp_path / "bad"), tmp_path / "marker"
    torch.save({"model.norm.weight": MarkerMaker(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint, match=r"open.*Convert it to safetensors"):
        open_checkpoint(folder)
    assert not marker.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # the file would have done it


def test_b_pickle_weights_2_a_tensor_subclass_is_named(clean: Path, tmp_path: Path) -> None:
    folder = as_bin(clean, tmp_path / "odd")
    torch.save({"model.norm.weight": torch.ones(32).as_subclass(Harmless)}, folder / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint, match=r"Harmless.*safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("shards", [1, 2])
def test_b_pickle_weights_3_a_bin_reads_like_safetensors(clean: Path, tmp_path: Path, shards: int) -> None:
    as_pickle = open_checkpoint(as_bin(clean, tmp_path / "bin", shards))
    assert len(as_pickle.files) == shards
    assert_equal(as_pickle, open_checkpoint(clean))
    assert fingerprint(as_pickle) == fingerprint(open_checkpoint(clean))


def test_b_pickle_weights_4_a_missing_shard_is_named(clean: Path, tmp_path: Path) -> None:
    folder = as_bin(clean, tmp_path / "bin", shards=2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(MissingTensors, match=r"pytorch_model-00002-of-00002\.bin"):
        open_checkpoint(folder)


def test_b_pickle_weights_5_safetensors_come_first(clean: Path, tmp_path: Path, caplog) -> None:
    folder = as_bin(clean, tmp_path / "both")
    shutil.copy(clean / "model.safetensors", folder)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with caplog.at_level(logging.INFO):
        assert_equal(open_checkpoint(folder), open_checkpoint(clean))
    assert "model.safetensors is read" in caplog.text


def test_a_bin_with_more_than_tensors_is_refused(clean: Path, tmp_path: Path) -> None:
    folder = as_bin(clean, tmp_path / "state")
    torch.save({"model": {"x": torch.ones(1)}, "epoch": 3}, folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedCheckpoint, match="training state"):
        open_checkpoint(folder)


def test_an_index_cannot_lead_out_of_its_folder(clean: Path, tmp_path: Path) -> None:
    folder = as_bin(clean, tmp_path / "bin", shards=2)
    index = {"weight_map": {"model.norm.weight": "../elsewhere.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside"):
        open_checkpoint(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_a_no_key_matches_2_wrapper_prefixes_are_removed(clean: Path, tmp_path: Path, prefix: str) -> None:
    tensors = load_file(clean / "model.safetensors")
    wrapped = rewritten(clean, tmp_path / "wrapped", {prefix + key: value for key, value in tensors.items()})
    assert_equal(open_checkpoint(wrapped), open_checkpoint(clean))


def test_a_no_key_matches_2_no_mixed_state(clean: Path, tmp_path: Path) -> None:
    tensors = load_file(clean / "model.safetensors")
    half = {("module." if i % 2 else "") + key: value for i, (key, value) in enumerate(tensors.items())}
    with pytest.raises(MissingTensors, match=r"module\."):
        open_checkpoint(rewritten(clean, tmp_path / "half", half))
    twice = tensors | {"_orig_mod.model.norm.weight": tensors["model.norm.weight"].clone()}
    with pytest.raises(CheckpointError, match="which one is meant"):
        open_checkpoint(rewritten(clean, tmp_path / "twice", twice))


def test_a_no_key_matches_3_missing_and_surplus_tensors_are_named(clean: Path, tmp_path: Path) -> None:
    tensors = load_file(clean / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if "layers.1.mlp" not in key}
    with pytest.raises(MissingTensors, match=r"layers\.1\.mlp\.down_proj\.weight.*model\.mystery\.weight"):
        open_checkpoint(rewritten(clean, tmp_path / "less", kept | {"model.mystery.weight": torch.ones(3)}))
    with pytest.raises(UnsupportedCheckpoint, match=r"model\.mystery\.weight"):
        open_checkpoint(rewritten(clean, tmp_path / "more", tensors | {"model.mystery.weight": torch.ones(3)}))


def test_a_no_key_matches_3_recomputed_buffers_are_skipped_and_logged(clean: Path, tmp_path: Path, caplog) -> None:
    tensors = load_file(clean / "model.safetensors")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with caplog.at_level(logging.INFO):
        opened = open_checkpoint(rewritten(clean, tmp_path / "old", tensors | {buffer: torch.ones(4)}))
    assert_equal(opened, open_checkpoint(clean))
    assert buffer in caplog.text


def test_keys_of_a_headless_model_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    for i, model in enumerate((tiny_llama(), tiny_gpt2())):
        whole = open_checkpoint(save(model, tmp_path / f"whole{i}"))
        headless = open_checkpoint(save(model.base_model, tmp_path / f"headless{i}"))
        assert_equal(headless, whole)
        assert next(deltas(whole, headless), None) is None


def test_a_head_that_is_missing_is_named(tmp_path: Path) -> None:
    untied = save(tiny_llama(tied=False), tmp_path / "untied")
    tensors = load_file(untied / "model.safetensors")
    del tensors["lm_head.weight"]
    with pytest.raises(MissingTensors, match=r"lm_head\.weight.*tie_word_embeddings"):
        open_checkpoint(rewritten(untied, tmp_path / "beheaded", tensors))


def test_a_shape_that_config_json_does_not_give_is_named(clean: Path, tmp_path: Path) -> None:
    tensors = load_file(clean / "model.safetensors") | {"model.norm.weight": torch.ones(31)}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[31\].*\[32\]"):
        open_checkpoint(rewritten(clean, tmp_path / "odd", tensors))


def test_what_is_no_checkpoint_says_so(clean: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no-such-org/no-such-model.*hub"):
        open_checkpoint("no-such-org/no-such-model")
    with pytest.raises(CheckpointError, match="no name of the form org/name"):
        open_checkpoint(tmp_path / "nothing" / "here")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    damaged = rewritten(clean, tmp_path / "damaged", {"x": torch.ones(1)})
    (damaged / "model.safetensors").write_bytes((clean / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(damaged)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "unheard_of"}, "unheard_of"),
        ({"architectures": ["OwnModel"]}, "OwnModel"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ],
)
def test_an_unsupported_architecture_is_named(clean: Path, tmp_path: Path, settings: dict, message: str) -> None:
    folder = rewritten(clean, tmp_path / "other", load_file(clean / "model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(UnsupportedCheckpoint, match=message):
        open_checkpoint(folder)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peak memory")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_model_is_never_in_memory_as_a_whole(tmp_path: Path, kind: str) -> None:
    model = tiny_llama(vocab=512, hidden=512, layers=10)
    base, fine = save(model, tmp_path / "base"), save(fine_tuned(model), tmp_path / "fine")
    if kind == "bin":
        base, fine = as_bin(base, tmp_path / "base_bin"), as_bin(fine, tmp_path / "fine_bin")
    size = sum(parameter.nbytes for parameter in model.parameters())
    del model
    pairs = deltas(open_checkpoint(base), open_checkpoint(fine))
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to now
    assert sum(1 for _ in pairs) > 50
    assert resident_bytes("VmHWM") - before < size / 4


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
