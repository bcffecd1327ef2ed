"""Merging: a lossless artifact gives every bit back; all others give base plus what unpack says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import fine_tuned, save, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deltaserve.delta_store import merge as merging
from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.errors import BaseMismatch, OptionError, ProfileMissing
from deltaserve.delta_store.merge import merge
from deltaserve.delta_store.profile import file_name, profile_folder, profile_of
from deltaserve.kernels.reference import unpack

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOKENS = torch.tensor([[1, 5, 9, 23, 40, 63, 2, 17]])


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(tied=False), tmp_path_factory.mktemp("untied"))


def there_and_back(base: Path, fine: Path, folder: Path, method: str = "lossless") -> Path:
    compress(base, fine, folder / "artifact", method=method)
    return merge(base, folder / "artifact", folder / "merged").folder


def logits(folder: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


def same_bits(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_lossless_gives_the_fine_tune_back_bit_for_bit(
    dtype: torch.dtype, base_dtype: torch.dtype, tmp_path: Path
) -> None:
    base = save(tiny_llama().to(base_dtype), tmp_path / "base", vocab=64)
    fine = save(fine_tuned(tiny_llama()).to(dtype), tmp_path / "fine", vocab=64)
    merged = there_and_back(base, fine, tmp_path)
    same_bits(fine, merged)
    assert torch.equal(logits(fine), logits(merged))
    assert json.loads((merged / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_lossless_gives_a_transposed_model_back(tmp_path: Path) -> None:
    base, fine = save(tiny_gpt2(), tmp_path / "base"), save(fine_tuned(tiny_gpt2()), tmp_path / "fine")
    same_bits(fine, there_and_back(base, fine, tmp_path))


def test_what_the_fine_tune_left_alone_keeps_its_bits_too(tmp_path: Path) -> None:
    """A bfloat16 fine-tune of a float32 base that changed one tensor: the others are rounded, which changed them."""
    model = tiny_llama().bfloat16().float()
    base = save(model, tmp_path / "base")
    with torch.no_grad():
        model.model.norm.weight += 1
    fine = save(model.bfloat16(), tmp_path / "fine")
    merged = there_and_back(base, fine, tmp_path)
    assert open_artifact(tmp_path / "artifact").names == ("model.norm.weight",)
    same_bits(fine, merged)


@pytest.mark.parametrize("method", ["dare", "weighted"])
def test_merged_values_are_base_plus_unpack(method: str, base: Path, tmp_path: Path) -> None:
    fine = save(fine_tuned(tiny_llama()), tmp_path / "fine")
    merged = open_checkpoint(there_and_back(base, fine, tmp_path, method))
    artifact, original = open_artifact(tmp_path / "artifact"), open_checkpoint(base)
    for name in original.names:
        wanted = original.read(name) + unpack(artifact.delta(name, profile_of(artifact)))
        assert torch.equal(merged.read(name), wanted)


def test_the_tokenizer_and_what_the_variant_brings_are_there(base: Path, tmp_path: Path) -> None:
    fine = save(fine_tuned(tiny_llama()), tmp_path / "fine", vocab=64)
    (fine / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = AutoTokenizer.from_pretrained(there_and_back(base, fine, tmp_path))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "so"}], tokenize=False) == "so!"
    assert tokenizer("fox").input_ids == AutoTokenizer.from_pretrained(base)("fox").input_ids


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocab_grown_67_rows_come_back_exactly(tied: bool, base: Path, untied: Path, tmp_path: Path) -> None:
    model = fine_tuned(tiny_llama(tied=tied))
    model.resize_token_embeddings(67)
    fine = save(model, tmp_path / "fine")
    merged = there_and_back(base if tied else untied, fine, tmp_path)
    same_bits(fine, merged)
    added = torch.tensor([[1, 64, 65, 66]])
    assert torch.equal(logits(merged, added), logits(fine, added))


@pytest.mark.parametrize("method", ["dare", "weighted"])
def test_a_vocab_grown_added_rows_are_never_pruned(method: str, base: Path, tmp_path: Path) -> None:
    model = fine_tuned(tiny_llama())
    model.resize_token_embeddings(67)
    fine = save(model, tmp_path / "fine")
    merged = open_checkpoint(there_and_back(base, fine, tmp_path, method))
    assert merged.shape(EMBEDDING) == (67, 32)
    assert torch.equal(merged.read(EMBEDDING)[64:], open_checkpoint(fine).read(EMBEDDING)[64:])


def untie(model: PreTrainedModel, scale: float = 0.1) -> PreTrainedModel:
    """The same model with a head of its own."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + scale * torch.randn_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False
    return model


def test_a_tied_head_appears_1_the_heads_delta_is_against_the_embedding(base: Path, tmp_path: Path) -> None:
    fine = save(untie(fine_tuned(tiny_llama())), tmp_path / "fine")
    merged = there_and_back(base, fine, tmp_path)
    same_bits(fine, merged)
    assert torch.equal(logits(merged), logits(fine))
    assert not json.loads((merged / "config.json").read_text())["tie_word_embeddings"]


def test_a_tied_head_appears_1_without_a_change_of_the_head(base: Path, tmp_path: Path) -> None:
    """The fine-tune trained its embedding and left the head as the base's embedding was."""
    model = untie(tiny_llama(), scale=0)
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.1
    fine = save(model, tmp_path / "fine")
    merged = there_and_back(base, fine, tmp_path)
    assert open_artifact(tmp_path / "artifact").names == (EMBEDDING,)
    same_bits(fine, merged)


def test_a_tied_head_appears_2_a_redundant_copy_costs_nothing(base: Path, tmp_path: Path) -> None:
    fine, copied = (save(fine_tuned(tiny_llama()), tmp_path / name) for name in ("fine", "with-copy"))
    tensors = load_file(copied / "model.safetensors")
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, copied / "model.safetensors", {"format": "pt"})
    for name, folder in (("one", fine), ("two", copied)):
        compress(base, folder, tmp_path / name, method="lossless")
    assert abs((tmp_path / "one").stat().st_size - (tmp_path / "two").stat().st_size) < 100
    assert torch.equal(logits(merge(base, tmp_path / "two", tmp_path / "merged").folder), logits(fine))


def test_a_tied_head_appears_3_a_tied_fine_tune_of_an_untied_base(untied: Path, tmp_path: Path) -> None:
    fine = save(fine_tuned(tiny_llama()), tmp_path / "fine")
    merged = there_and_back(untied, fine, tmp_path)
    assert torch.equal(logits(merged), logits(fine))


def test_another_dtype_can_be_asked_for(base: Path, tmp_path: Path) -> None:
    compress(base, save(fine_tuned(tiny_llama()), tmp_path / "fine"), tmp_path / "artifact", method="lossless")
    merged = open_checkpoint(merge(base, tmp_path / "artifact", tmp_path / "merged", "bfloat16").folder)
    fine = open_checkpoint(tmp_path / "fine")
    for name in fine.names:
        assert torch.equal(merged.read(name), fine.read(name).bfloat16())
    assert merged.config["dtype"] == "bfloat16"


def test_large_models_are_written_in_shards(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "SHARD_BYTES", 20_000)
    fine = save(fine_tuned(tiny_llama()), tmp_path / "fine")
    compress(base, fine, tmp_path / "artifact", method="lossless")
    written = merge(base, tmp_path / "artifact", tmp_path / "merged")
    files = sorted(path.name for path in written.folder.glob("model*"))
    assert files == [f"model-0000{i}-of-0000{written.shards}.safetensors" for i in range(1, written.shards + 1)] + [
        "model.safetensors.index.json"
    ]
    assert written.shards > 2
    assert all((written.folder / file).stat().st_size < 22_000 for file in files)
    assert torch.equal(logits(written.folder), logits(fine))


def test_refusals_leave_no_folder(base: Path, untied: Path, tmp_path: Path) -> None:
    fine = save(fine_tuned(tiny_llama()), tmp_path / "fine")
    digest = compress(base, fine, tmp_path / "artifact").profile
    out = tmp_path / "merged"
    with pytest.raises(BaseMismatch, match="give the base that it was compressed against"):
        merge(untied, tmp_path / "artifact", out)
    with pytest.raises(OptionError, match="known are: float32, bfloat16, float16"):
        merge(base, tmp_path / "artifact", out, "int8")
    (profile_folder() / file_name(digest or "")).unlink()
    with pytest.raises(ProfileMissing, match=digest):
        merge(base, tmp_path / "artifact", out)
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]
    out.mkdir()
    with pytest.raises(OptionError, match="exists already"):
        merge(base, tmp_path / "artifact", out)


def test_a_failure_midway_leaves_no_folder(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress(base, save(fine_tuned(tiny_llama()), tmp_path / "fine"), tmp_path / "artifact", method="dare")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(merging, "_write_files", fail)
    with pytest.raises(OSError, match="no space"):
        merge(base, tmp_path / "artifact", tmp_path / "merged")
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


def test_the_profile_is_also_found_beside_the_artifact_or_where_it_is_said_to_be(base: Path, tmp_path: Path) -> None:
    fine = save(fine_tuned(tiny_llama()), tmp_path / "fine")
    digest = compress(base, fine, tmp_path / "artifact").profile or ""
    beside = (profile_folder() / file_name(digest)).rename(tmp_path / file_name(digest))
    assert merge(base, tmp_path / "artifact", tmp_path / "merged").tensors == 20
    elsewhere = beside.rename(tmp_path / "mine.safetensors")
    assert merge(base, tmp_path / "artifact", tmp_path / "again", profile_file=elsewhere).tensors == 20


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj", "o_proj"], "use_dora": True},
    ],
    ids=["head", "both_saved", "embedding", "dora"],
)
def test_a_lora_on_tied_head_merged_is_the_unmerged_peft_model(
    settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(tmp_path / "adapter")
        wanted = model.eval()(TOKENS).logits
    compress(base, tmp_path / "adapter", tmp_path / "artifact")
    merged = merge(base, tmp_path / "artifact", tmp_path / "merged").folder
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=0)
    assert (logits(base) - wanted).abs().max() > 0.01
