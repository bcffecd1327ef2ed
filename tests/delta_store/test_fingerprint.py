"""The fingerprint names parameters and their values, and nothing about the files that they come in."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save, tiny_llama
from torch import Tensor

from deltaserve.delta_store.checkpoint import Checkpoint, open_checkpoint
from deltaserve.delta_store.fingerprint import fingerprint


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def of(folder: Path) -> str:
    return fingerprint(open_checkpoint(folder))


def edited(folder: Path, target: Path, **changes: Tensor) -> Path:
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    save_file(load_file(folder / "model.safetensors") | changes, target / "model.safetensors")
    return target


def test_it_is_a_fixed_function_of_the_parameters(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 64)
    expected = "94bddc1df758e28b8a790020020e1e97d80ea3c9f87863776167c566e510b41b"
    assert of(save(model, tmp_path / "model")) == expected


def test_sharding_folder_dtype_and_a_redundant_head_do_not_matter(tmp_path: Path) -> None:
    model = tiny_llama().bfloat16()
    whole = save(model, tmp_path / "whole")
    first = of(whole)
    tensors = load_file(whole / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    assert of(save(model, tmp_path / "sharded", max_shard_size="20KB")) == first
    assert of(edited(whole, tmp_path / "with_head", **{"lm_head.weight": head})) == first
    assert of(edited(whole, tmp_path / "float32", **{key: value.float() for key, value in tensors.items()})) == first
    wrapped = edited(whole, tmp_path / "wrapped")
    save_file({f"_orig_mod.{key}": value for key, value in tensors.items()}, wrapped / "model.safetensors")
    assert of(wrapped) == first


def test_one_changed_value_matters(tmp_path: Path) -> None:
    whole = save(tiny_llama(), tmp_path / "whole")
    norm = load_file(whole / "model.safetensors")["model.norm.weight"]
    norm[0] = torch.nextafter(norm[0], torch.tensor(9.0))
    assert of(edited(whole, tmp_path / "other", **{"model.norm.weight": norm})) != of(whole)


def test_it_is_kept_and_computed_again_when_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = save(tiny_llama(), tmp_path / "whole")
    first = of(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read", lambda self, name: pytest.fail("read again"))
        assert of(whole) == first
    save(tiny_llama(seed=5), whole)
    assert of(whole) != first


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = save(tiny_llama(), tmp_path / "whole")
    (tmp_path / "file").write_text("in the way")
    first = of(whole)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert of(whole) == first
