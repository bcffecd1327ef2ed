"""Base plus adapter is the unmerged PEFT model, tensor kind by tensor kind; what has no place is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_models import TOKENS, adapted, logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import save, tiny_gpt2, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.errors import CheckpointError, MissingTensors, UnsupportedCheckpoint
from deltaserve.delta_store.lora import is_adapter, open_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FILE = "adapter_model.safetensors"


def train(model: PreTrainedModel, folder: Path, **settings: Any) -> PeftModel:
    """An adapter on ``model``, with noise in every trainable parameter, saved in ``folder``."""
    torch.manual_seed(3)
    peft_model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings))
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    peft_model.save_pretrained(folder)
    return peft_model.eval()


def fresh(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base)


def check(base: Path, folder: Path, peft_model: PeftModel, tokens: Tensor = TOKENS) -> None:
    """Logits equal those of the unmerged PEFT model, and the adapter does something."""
    opened = open_checkpoint(base)
    ours = logits(adapted(opened, open_adapter(folder, opened)), tokens)
    torch.testing.assert_close(ours, logits(peft_model, tokens), atol=1e-4, rtol=0)
    if ours.shape[-1] == 64:
        assert (ours - logits(fresh(base), tokens)).abs().max() > 0.01


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, with biases in its attention."""
    return save(tiny_llama(attention_bias=True), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(tied=False), tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_gpt2(), tmp_path_factory.mktemp("gpt2"))


KINDS = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rank_stabilised": {"target_modules": ["q_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 7, "up_proj": 2},
        "alpha_pattern": {"v_proj": 11, r"layers\.0.*up_proj": 3},
    },
    "dora": {"target_modules": ["q_proj", "o_proj"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding_dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "embedding_and_head_tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "saved_norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "saved_embedding_only": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "bias_of_lora": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "bias_of_all": {"target_modules": ["q_proj"], "bias": "all"},
    "bias_in_b": {"target_modules": ["q_proj"], "lora_bias": True},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_unmerged_peft_models(base: Path, tmp_path: Path, kind: str) -> None:
    check(base, tmp_path, train(fresh(base), tmp_path, **KINDS[kind]))


def test_plain_products_stay_low_rank(base: Path, tmp_path: Path) -> None:
    train(fresh(base), tmp_path, target_modules=["k_proj"])
    adapter = open_adapter(tmp_path, open_checkpoint(base))
    a, b = adapter.low_rank["model.layers.0.self_attn.k_proj.weight"]
    assert (a.shape, b.shape) == ((4, 32), (16, 4))
    assert len(adapter.low_rank) == 2
    assert list(adapter.dense) == []
    assert adapter.tied_head


@pytest.mark.parametrize("base_kind", ["base", "untied"])
def test_a_lora_on_tied_head_a_only_the_output_side_changes(base_kind: str, tmp_path: Path, request) -> None:
    folder = request.getfixturevalue(base_kind)
    peft_model = train(fresh(folder), tmp_path, target_modules=["lm_head"])
    check(folder, tmp_path, peft_model)
    opened = open_checkpoint(folder)
    adapter = open_adapter(tmp_path, opened)
    assert set(adapter.low_rank) == {HEAD}
    assert list(adapter.dense) == []
    assert not adapter.tied_head
    embedding = adapted(opened, adapter).get_input_embeddings().weight
    assert torch.equal(embedding, fresh(folder).get_input_embeddings().weight)


def test_a_lora_on_tied_head_b_embedding_and_head_keep_their_own_values(base: Path, tmp_path: Path) -> None:
    both = ["embed_tokens", "lm_head"]
    peft_model = train(fresh(base), tmp_path, target_modules=["q_proj"], modules_to_save=both)
    check(base, tmp_path, peft_model)
    adapter = open_adapter(tmp_path, open_checkpoint(base))
    found = {delta.name: delta.fine for delta in adapter.dense}
    assert set(found) == {EMBEDDING, HEAD}
    assert not torch.equal(found[EMBEDDING], found[HEAD])
    assert not adapter.tied_head


def test_a_adapter_leftovers_1_dora_is_merged_minus_base(base: Path, tmp_path: Path) -> None:
    peft_model = train(fresh(base), tmp_path, target_modules=["q_proj"], use_dora=True)
    adapter = open_adapter(tmp_path, open_checkpoint(base))
    assert adapter.low_rank == {}
    merged = peft_model.merge_and_unload().state_dict()
    for delta in adapter.dense:
        torch.testing.assert_close(delta.fine, merged[delta.name], atol=1e-6, rtol=0)


def test_a_adapter_leftovers_2_saved_modules_are_used(untied: Path, tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    check(untied, tmp_path, train(fresh(untied), tmp_path, **settings))
    assert HEAD in {delta.name for delta in open_adapter(tmp_path, open_checkpoint(untied)).dense}


def test_a_adapter_leftovers_3_biases_are_used(base: Path, tmp_path: Path) -> None:
    check(base, tmp_path, train(fresh(base), tmp_path, target_modules=["q_proj"], bias="lora_only"))
    names = {delta.name for delta in open_adapter(tmp_path, open_checkpoint(base)).dense}
    assert names == {f"model.layers.{i}.self_attn.q_proj.bias" for i in range(2)}


def test_a_adapter_leftovers_every_unused_tensor_is_listed(base: Path, untied: Path, tmp_path: Path) -> None:
    train(fresh(base), tmp_path, target_modules=["q_proj"], bias="lora_only")
    tensors = load_file(tmp_path / FILE)
    q_projs = [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in range(2)]
    unknown = {
        f"{q_proj}.{kind}": torch.ones(2) for q_proj in q_projs for kind in ("lora_C.weight", "lora_D", "extra.bias")
    }
    save_file(tensors | unknown, tmp_path / FILE)
    with pytest.raises(UnsupportedCheckpoint) as caught:
        open_adapter(tmp_path, open_checkpoint(base))
    assert all(key in str(caught.value) for key in unknown)
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(UnsupportedCheckpoint, match=r"q_proj\.base_layer\.bias.*lora_bias"):
        open_adapter(tmp_path, open_checkpoint(untied))  # this base has no biases


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"some_new_kind": {"x": 1}}, "some_new_kind"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*lm_head"),
        ({"r": 8}, "rank 8.*rank 4"),
        ({"r": None}, "not the configuration"),
    ],
)
def test_a_adapter_leftovers_a_setting_that_cannot_be_heeded_is_named(
    base: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    train(fresh(base), tmp_path, target_modules=["q_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(CheckpointError, match=message):
        open_adapter(tmp_path, open_checkpoint(base))


def test_a_magnitude_is_not_dropped_where_use_dora_is_off(base: Path, tmp_path: Path) -> None:
    train(fresh(base), tmp_path, target_modules=["q_proj"], use_dora=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(CheckpointError, match=r"use_dora is False.*has a lora_magnitude_vector"):
        open_adapter(tmp_path, open_checkpoint(base))


GPT2_LAYERS = {"c_attn": "transformer.h.0.attn.c_attn", "attn.c_proj": "transformer.h.0.attn.c_proj"}


@pytest.mark.parametrize("layer", GPT2_LAYERS)
@pytest.mark.parametrize("dora", [False, True])
def test_a_transposed_linear_equals_pefts_own_delta(gpt2: Path, tmp_path: Path, layer: str, dora: bool) -> None:
    """The square layer is checked on its own: a wrong orientation would raise nothing there."""
    settings = {"target_modules": [layer], "fan_in_fan_out": True, "use_dora": dora}
    peft_model = train(fresh(gpt2), tmp_path, **settings)
    check(gpt2, tmp_path, peft_model)
    opened = open_checkpoint(gpt2)
    adapter = open_adapter(tmp_path, opened)
    name = GPT2_LAYERS[layer] + ".weight"
    if dora:
        merged = peft_model.merge_and_unload().state_dict()[name]
        ours = next(delta for delta in adapter.dense if delta.name == name)
        assert ours.transposed
        torch.testing.assert_close(ours.fine, merged, atol=1e-6, rtol=0)
    else:
        module = peft_model.base_model.model.get_submodule(GPT2_LAYERS[layer])
        a, b = adapter.low_rank[name]
        torch.testing.assert_close((b @ a).T, module.get_delta_weight("default"), atol=1e-6, rtol=0)


def renamed(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / FILE)
    save_file({key.replace(old, new): value for key, value in tensors.items()}, folder / FILE)


@pytest.mark.parametrize(
    ("old", "new", "matched"),
    [
        ("model.model.layers", "model.language_model.model.layers", 0),
        ("model.model.layers", "model.layers", 0),
        ("layers.1.", "layers.7.", 2),
    ],
)
def test_a_no_key_matches_1_and_4_counts_and_samples(
    base: Path, tmp_path: Path, old: str, new: str, matched: int
) -> None:
    train(fresh(base), tmp_path, target_modules=["q_proj", "v_proj"])
    renamed(tmp_path, old, new)
    with pytest.raises(CheckpointError) as caught:
        open_adapter(tmp_path, open_checkpoint(base))
    message = str(caught.value)
    assert f"{matched} of 4 modules" in message
    assert new.removeprefix("model.") in message
    assert "model.layers.0.self_attn." in message


def test_a_no_key_matches_2_wrappers_of_an_adapter_are_removed(base: Path, tmp_path: Path) -> None:
    peft_model = train(fresh(base), tmp_path, target_modules=["q_proj"])
    renamed(tmp_path, "base_model.", "module._orig_mod.base_model.")
    check(base, tmp_path, peft_model)


def test_an_adapter_without_tensors_or_with_half_a_pair_is_refused(base: Path, tmp_path: Path) -> None:
    train(fresh(base), tmp_path, target_modules=["q_proj"])
    tensors = load_file(tmp_path / FILE)
    save_file(
        {key: value for key, value in tensors.items() if "layers.1.self_attn.q_proj.lora_B" not in key}, tmp_path / FILE
    )
    with pytest.raises(MissingTensors, match=r"layers\.1\.self_attn\.q_proj has only one of"):
        open_adapter(tmp_path, open_checkpoint(base))
    save_file({}, tmp_path / FILE)
    with pytest.raises(MissingTensors, match="no tensors"):
        open_adapter(tmp_path, open_checkpoint(base))


def test_products_of_another_size_are_refused(base: Path, tmp_path: Path) -> None:
    train(tiny_llama(hidden=64), tmp_path, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: lora_A \[4, 64\] and lora_B \[64, 4\].*\[32, 32\]"):
        open_adapter(tmp_path, open_checkpoint(base))


GROWN = {
    "q_proj": {"target_modules": ["q_proj"]},
    "saved_embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved_both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
}


@pytest.mark.parametrize("base_kind", ["base", "untied"])
@pytest.mark.parametrize("kind", GROWN)
def test_a_vocab_grown_before_the_adapter_was_trained(base_kind: str, kind: str, tmp_path: Path, request) -> None:
    folder = request.getfixturevalue(base_kind)
    model = fresh(folder)
    model.resize_token_embeddings(67)
    peft_model = train(model, tmp_path, **GROWN[kind])
    tokens = torch.cat([TOKENS, torch.tensor([[64, 65], [66, 64]])], 1)
    opened = open_checkpoint(folder)
    if base_kind == "untied" and kind in ("embedding", "head"):
        # PEFT saves only one of the two resized matrices then, so the other's new rows cannot be known.
        with pytest.raises(CheckpointError, match="different numbers of rows"):
            open_adapter(tmp_path, opened)
    else:
        ours = logits(adapted(opened, open_adapter(tmp_path, opened)), tokens)
        torch.testing.assert_close(ours, logits(peft_model, tokens), atol=1e-4, rtol=0)


def test_a_resized_tied_pair_is_stored_once(base: Path, tmp_path: Path) -> None:
    model = fresh(base)
    model.resize_token_embeddings(67)
    train(model, tmp_path, target_modules=["q_proj"])
    adapter = open_adapter(tmp_path, open_checkpoint(base))
    assert adapter.tied_head
    assert [delta.name for delta in adapter.dense] == [EMBEDDING]


def test_is_adapter(base: Path, tmp_path: Path) -> None:
    train(fresh(base), tmp_path, target_modules=["q_proj"])
    assert is_adapter(tmp_path)
    assert not is_adapter(base)
    assert not is_adapter("some-org/some-model")
    with pytest.raises(CheckpointError, match="is a LoRA adapter"):
        open_checkpoint(tmp_path)
