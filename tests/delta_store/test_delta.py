"""Base plus delta is the fine-tune, and what does not line up is refused before any tensor is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from merged_models import TOKENS, logits, merged
from safetensors.torch import load_file, save_file
from tiny_models import fine_tuned, save, tiny_gpt2, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltaserve.delta_store.checkpoint import Checkpoint, open_checkpoint
from deltaserve.delta_store.delta import TensorDelta, deltas, head_is_tied
from deltaserve.delta_store.errors import CheckpointError, UnsupportedCheckpoint

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def untied(model: PreTrainedModel, seed: int = 9) -> PreTrainedModel:
    """A fine-tune whose head has gone its own way."""
    own = tiny_llama(tied=False)
    own.load_state_dict(fine_tuned(model, seed).state_dict())
    with torch.no_grad():
        own.lm_head.weight += 0.05 * torch.randn(
            own.lm_head.weight.shape, generator=torch.Generator().manual_seed(seed)
        )
    return own


def by_name(base: Checkpoint, fine: Checkpoint) -> dict[str, TensorDelta]:
    return {delta.name: delta for delta in deltas(base, fine)}


def edited(folder: Path, target: Path, tensors: dict[str, Tensor] | None = None, **settings: object) -> Path:
    """A copy of a checkpoint with other tensors or settings."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | settings))
    if tensors:
        save_file(load_file(folder / "model.safetensors") | tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tied=False), tiny_gpt2])
def test_base_plus_delta_is_the_fine_tune(make, tmp_path: Path) -> None:
    model = make()
    tuned = fine_tuned(model)
    base, fine = open_checkpoint(save(model, tmp_path / "b")), open_checkpoint(save(tuned, tmp_path / "f"))
    assert set(by_name(base, fine)) == set(base.names)
    assert head_is_tied(base, fine) == model.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged(base, fine)), logits(tuned), atol=1e-4, rtol=0)


def test_equal_tensors_are_absent(tmp_path: Path) -> None:
    model = tiny_llama()
    tuned = fine_tuned(model, scale=0)
    with torch.no_grad():
        tuned.model.norm.weight[3] += 1
    base, fine = open_checkpoint(save(model, tmp_path / "b")), open_checkpoint(save(tuned, tmp_path / "f"))
    assert set(by_name(base, fine)) == {"model.norm.weight"}
    assert by_name(base, base) == {}


def test_other_dtypes_are_subtracted_in_float32(tmp_path: Path) -> None:
    model = tiny_llama().bfloat16()
    tuned = fine_tuned(model.float())
    base = open_checkpoint(save(model.bfloat16(), tmp_path / "b"))
    for i, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        fine = open_checkpoint(save(tuned.to(dtype), tmp_path / f"f{i}"))
        delta = by_name(base, fine)["model.norm.weight"]
        assert [tensor.dtype for tensor in delta.raw] == [torch.bfloat16, dtype]
        assert delta.base.dtype == delta.fine.dtype == torch.float32
        assert torch.equal(delta.fine, tuned.model.norm.weight.float())
    same = open_checkpoint(save(model.float(), tmp_path / "same"))
    assert by_name(base, same) == {}


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocab_grown_rows_are_added(tmp_path: Path, tied: bool) -> None:
    """Outcome (a): all rows of the fine-tune come out, the added ones in full."""
    model = tiny_llama(tied=tied)
    tuned = fine_tuned(model)
    tuned.resize_token_embeddings(67)
    base, fine = open_checkpoint(save(model, tmp_path / "b")), open_checkpoint(save(tuned, tmp_path / "f"))
    found = by_name(base, fine)
    assert found[EMBEDDING].base.shape == (64, 32)
    assert torch.equal(found[EMBEDDING].fine, tuned.model.embed_tokens.weight)
    assert (HEAD in found) == (not tied)
    tokens = torch.cat([TOKENS, torch.tensor([[64, 65], [66, 64]])], 1)
    torch.testing.assert_close(logits(merged(base, fine), tokens), logits(tuned, tokens), atol=1e-4, rtol=0)
    assert logits(merged(base, fine)).shape[-1] == 67


def test_a_vocab_grown_lost_rows_are_refused(tmp_path: Path) -> None:
    base = open_checkpoint(save(tiny_llama(vocab=67), tmp_path / "b"))
    fine = open_checkpoint(save(tiny_llama(vocab=64), tmp_path / "f"))
    with pytest.raises(CheckpointError, match=r"embed_tokens.*\[67, 32\] in the base.*\[64, 32\] in the fine-tune"):
        deltas(base, fine)


def test_a_tied_head_appears_1_in_the_fine_tune_only(tmp_path: Path) -> None:
    model = tiny_llama()
    tuned = untied(model)
    base, fine = open_checkpoint(save(model, tmp_path / "b")), open_checkpoint(save(tuned, tmp_path / "f"))
    found = by_name(base, fine)
    assert not head_is_tied(base, fine)
    assert torch.equal(found[HEAD].base, model.model.embed_tokens.weight)
    assert torch.equal(found[HEAD].fine, tuned.lm_head.weight)
    torch.testing.assert_close(logits(merged(base, fine)), logits(tuned), atol=1e-4, rtol=0)


def test_a_tied_head_appears_1_though_the_configuration_says_tied(tmp_path: Path) -> None:
    model = tiny_llama()
    base = open_checkpoint(save(model, tmp_path / "b"))
    other_head = {HEAD: torch.randn(64, 32)}
    folder = edited(tmp_path / "b", tmp_path / "f", other_head)
    fine = open_checkpoint(folder)
    assert not fine.tied
    assert set(by_name(base, fine)) == {HEAD}
    as_transformers_has_it = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(merged(base, fine)), logits(as_transformers_has_it), atol=1e-4, rtol=0)


def test_a_tied_head_appears_2_a_redundant_copy_makes_no_difference(tmp_path: Path) -> None:
    model = tiny_llama()
    tuned = fine_tuned(model)
    base, fine = open_checkpoint(save(model, tmp_path / "b")), open_checkpoint(save(tuned, tmp_path / "f"))
    copy = {HEAD: tuned.model.embed_tokens.weight.detach().clone()}
    redundant = open_checkpoint(edited(tmp_path / "f", tmp_path / "r", copy))
    assert head_is_tied(base, redundant)
    without, with_copy = by_name(base, fine), by_name(base, redundant)
    assert without.keys() == with_copy.keys()
    assert all(torch.equal(without[name].fine, with_copy[name].fine) for name in without)


def test_a_tied_head_appears_3_in_the_base_only(tmp_path: Path) -> None:
    model = untied(tiny_llama())
    tuned = fine_tuned(tiny_llama())
    base, fine = open_checkpoint(save(model, tmp_path / "b")), open_checkpoint(save(tuned, tmp_path / "f"))
    found = by_name(base, fine)
    assert not head_is_tied(base, fine)
    assert torch.equal(found[HEAD].base, model.lm_head.weight)
    assert torch.equal(found[HEAD].fine, tuned.model.embed_tokens.weight)
    torch.testing.assert_close(logits(merged(base, fine)), logits(tuned), atol=1e-4, rtol=0)


def test_a_transposed_linear_keeps_the_bases_orientation(tmp_path: Path) -> None:
    model = tiny_gpt2()
    base = open_checkpoint(save(model, tmp_path / "b"))
    fine = open_checkpoint(save(fine_tuned(model), tmp_path / "f"))
    found = by_name(base, fine)
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    expected = {f"transformer.h.{i}.{layer}.weight" for i in range(2) for layer in layers}
    assert {name for name, delta in found.items() if delta.transposed} == expected
    assert found["transformer.h.0.attn.c_attn.weight"].base.shape == (32, 96)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_a_fine_tune_that_computes_otherwise_is_refused(tmp_path: Path, settings: dict, message: str) -> None:
    base = open_checkpoint(save(tiny_llama(), tmp_path / "b"))
    fine = open_checkpoint(edited(tmp_path / "b", tmp_path / "f", **settings))
    with pytest.raises(UnsupportedCheckpoint, match=message):
        deltas(base, fine)


def test_settings_that_change_nothing_are_no_obstacle(tmp_path: Path) -> None:
    base = open_checkpoint(save(tiny_llama(), tmp_path / "b"))
    settings = {"rms_norm_eps": 9.999999974752427e-07, "use_cache": False, "attention_dropout": 0.1, "trainer": "x"}
    fine = open_checkpoint(edited(tmp_path / "b", tmp_path / "f", **settings))
    assert by_name(base, fine) == {}


def test_another_architecture_is_refused_before_any_tensor_is_read(tmp_path: Path, monkeypatch) -> None:
    base = open_checkpoint(save(tiny_llama(), tmp_path / "b"))
    others = [save(tiny_gpt2(), tmp_path / "g"), save(tiny_llama(layers=3), tmp_path / "l")]
    opened = [open_checkpoint(other) for other in others]
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: pytest.fail("a tensor was read"))
    with pytest.raises(UnsupportedCheckpoint, match=r"LlamaForCausalLM.*GPT2LMHeadModel"):
        deltas(base, opened[0])
    with pytest.raises(UnsupportedCheckpoint, match=r"num_hidden_layers \(2 in the base, 3 in the fine-tune\)"):
        deltas(base, opened[1])


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    base = open_checkpoint(save(tiny_llama(), tmp_path / "b"))
    broken = {"model.norm.weight": torch.full((32,), float("nan"))}
    fine = open_checkpoint(edited(tmp_path / "b", tmp_path / "f", broken))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight of the fine-tune"):
        list(deltas(base, fine))
