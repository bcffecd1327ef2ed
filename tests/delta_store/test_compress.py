"""Compressing: everything counted, what travels along, refusals that leave nothing."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_encoders import classifier_of, save_encoder, tiny_encoder
from tiny_models import fine_tuned, save, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.errors import CheckpointError, DeltaServeError, OptionError, UnsupportedCheckpoint
from deltaserve.delta_store.merge import variant_tensors
from deltaserve.delta_store.profile import Profile, profile_of
from deltaserve.delta_store.pruning.methods import KEPT

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("own_cache")]


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(fine_tuned(tiny_llama()), tmp_path_factory.mktemp("fine"), vocab=64)


def adapter_of(base: Path, folder: Path, **settings: object) -> Path:
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


def test_the_receipt_counts_everything(base: Path, fine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    receipt = compress(base, fine, out, method="dare")
    assert receipt.digest == hashlib.sha256(out.read_bytes()).hexdigest()
    assert receipt.size_bytes == out.stat().st_size
    assert receipt.full_bytes == 2 * sum(p.numel() for p in tiny_llama().parameters())
    assert receipt.ratio == receipt.full_bytes / receipt.size_bytes
    assert (receipt.tensors_changed, receipt.tensors_total) == (20, 20)
    assert (receipt.profile, receipt.warnings) == (None, ())


def test_an_artifact_says_how_it_was_made_and_not_where(base: Path, fine: Path, tmp_path: Path) -> None:
    receipt = compress(base, fine, tmp_path / "out", options={"seed": 5, "drop": 0.5})
    manifest = open_artifact(tmp_path / "out").manifest
    made = manifest.provenance
    assert (made["method"], made["base"], made["fine_tuned"], made["dtype"]) == (
        "weighted",
        base.name,
        fine.name,
        "float32",
    )
    assert made["options"] == {"drop": 0.5, "block": 16, "codec": "int2", "seed": 5, **KEPT}
    assert manifest.profile == receipt.profile
    assert str(tmp_path).encode() not in (tmp_path / "out").read_bytes()
    assert str(base.parent).encode() not in (tmp_path / "out").read_bytes()


def test_tensors_that_are_the_bases_are_absent(base: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 0.5
    compress(base, save(model, tmp_path / "fine"), tmp_path / "out", method="dare")
    assert open_artifact(tmp_path / "out").names == ("model.layers.1.mlp.up_proj.weight",)


def test_a_no_key_matches_an_all_zero_delta_warns(base: Path, tmp_path: Path) -> None:
    receipt = compress(base, save(tiny_llama(), tmp_path / "same"), tmp_path / "out")
    assert receipt.warnings == ("same equals the base, so the artifact holds no delta",)
    artifact = open_artifact(tmp_path / "out")
    assert artifact.names == ()
    assert artifact.manifest.provenance["warnings"] == list(receipt.warnings)


def test_a_no_key_matches_wrapped_names_give_the_same_artifact(base: Path, fine: Path, tmp_path: Path) -> None:
    wrapped = save(fine_tuned(tiny_llama()), tmp_path / fine.name, vocab=64)
    tensors = {f"module._orig_mod.{name}": t for name, t in load_file(wrapped / "model.safetensors").items()}
    save_file(tensors, wrapped / "model.safetensors", {"format": "pt"})
    one, other = (compress(base, folder, tmp_path / "out", method="dare").digest for folder in (fine, wrapped))
    assert one == other


def test_a_no_key_matches_a_missing_layer_leaves_no_file(base: Path, fine: Path, tmp_path: Path) -> None:
    tensors = load_file(fine / "model.safetensors")
    broken = save(tiny_llama(), tmp_path / "broken")
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file({k: t for k, t in tensors.items() if k != gone}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=gone):
        compress(base, broken, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_files_that_differ_travel_and_others_do_not(base: Path, tmp_path: Path) -> None:
    fine = save(fine_tuned(tiny_llama()), tmp_path / "fine", vocab=64)
    (fine / "chat_template.jinja").write_text("{{ messages[0].content }}")
    settings = json.loads((fine / "generation_config.json").read_text())
    (fine / "generation_config.json").write_text(json.dumps({**settings, "transformers_version": "1"}))
    compress(base, fine, tmp_path / "out", method="dare")
    assert open_artifact(tmp_path / "out").files == {"chat_template.jinja": b"{{ messages[0].content }}"}


def test_an_adapter_is_stored_as_its_factors(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", r=4, target_modules=["q_proj", "up_proj"])
    receipt = compress(base, adapter, tmp_path / "out")
    artifact = open_artifact(tmp_path / "out")
    assert (receipt.method, receipt.tensors_changed) == ("lora", 4)
    assert {spec.kind for name in artifact.names for spec in artifact.specs(name)} == {"low_rank"}
    assert artifact.manifest.tied_head


@pytest.mark.parametrize("method", ["lora", "dare"])
def test_an_adapter_decodes_to_peft_merged(method: str, base: Path, tmp_path: Path) -> None:
    """Nothing dropped and in float32, dare gives the same."""
    adapter = adapter_of(base, tmp_path / "adapter", r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    options = {"drop": 0.0, "codec": "float32"} if method == "dare" else {}
    compress(base, adapter, tmp_path / "out", method=method, options=options)
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    wanted = model.merge_and_unload().state_dict()
    for name, tensor in variant_tensors(open_checkpoint(base), open_artifact(tmp_path / "out"), None):
        torch.testing.assert_close(tensor, wanted[name], atol=1e-2 if "norm" in name else 1e-6, rtol=0)


def test_a_transposed_linear_survives(tmp_path: Path) -> None:
    """Nothing dropped: the square layer and the other are the fine-tune's, as GPT-2 stores them."""
    base, fine = save(tiny_gpt2(), tmp_path / "base"), save(fine_tuned(tiny_gpt2()), tmp_path / "fine")
    for method in ("dare", "weighted"):
        compress(base, fine, tmp_path / "out", method=method, options={"drop": 0.0, "codec": "float32"})
        artifact, wanted = open_artifact(tmp_path / "out"), open_checkpoint(fine)
        merged = dict(variant_tensors(open_checkpoint(base), artifact, profile_of(artifact)))
        for layer in ("c_attn", "c_proj"):
            name = f"transformer.h.0.attn.{layer}.weight"
            torch.testing.assert_close(merged[name], wanted.read(name), atol=1e-6, rtol=0)


def test_position_embeddings_are_not_pruned(tmp_path: Path) -> None:
    base, fine = save(tiny_gpt2(), tmp_path / "base"), save(fine_tuned(tiny_gpt2()), tmp_path / "fine")
    compress(base, fine, tmp_path / "out", method="dare")
    kinds = {spec.kind for spec in open_artifact(tmp_path / "out").specs("transformer.wpe.weight")}
    assert kinds == {"rows", "low_rank"}


def test_a_profile_of_one_text_serves_another_fine_tune(base: Path, fine: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a domain of its own. " * 100)
    one = compress(base, fine, tmp_path / "one", calibration=text, profile=tmp_path / "profile")
    other = save(fine_tuned(tiny_llama(), seed=8), tmp_path / "other")
    two = compress(base, other, tmp_path / "two", profile=tmp_path / "profile")
    assert one.profile == two.profile == Profile.open(tmp_path / "profile").digest
    artifact = open_artifact(tmp_path / "two")
    assert len(dict(variant_tensors(open_checkpoint(base), artifact, profile_of(artifact)))) == 20


def test_evaluating_writes_the_report_into_the_artifact(base: Path, fine: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    receipt = compress(base, fine, tmp_path / "out", method="dare", options={"drop": 0.5}, evaluate=text)
    report = open_artifact(tmp_path / "out").manifest.quality
    assert receipt.quality is not None
    assert report is not None
    assert report["kl_mean"] == receipt.quality.kl_mean > 0
    assert receipt.quality.kl_base is not None
    assert report["kl_base"] == receipt.quality.kl_base > 0
    assert report["text"] == "text.txt"
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["out", "text.txt"]


def test_every_artifact_of_a_language_model_has_a_report(base: Path, fine: Path, tmp_path: Path) -> None:
    receipt = compress(base, fine, tmp_path / "out", method="dare", options={"drop": 0.5})
    report = open_artifact(tmp_path / "out").manifest.quality
    assert report is not None
    assert receipt.quality is not None
    assert report["text"] == receipt.text == "built-in prose"
    assert report["tokens"] == receipt.quality.tokens > 500
    assert report["gain_kept"] is None
    without = compress(base, fine, tmp_path / "without", method="dare", options={"drop": 0.5}, measure=False)
    assert without.quality is without.text is open_artifact(tmp_path / "without").manifest.quality is None


def test_a_classifier_has_no_report_of_prose(tmp_path: Path) -> None:
    base = save_encoder(tiny_encoder(), tmp_path / "base")
    compress(base, save_encoder(classifier_of(tiny_encoder()), tmp_path / "fine"), tmp_path / "out", method="lossless")
    assert open_artifact(tmp_path / "out").manifest.quality is None


def test_the_report_has_bytes_and_plain_dare_beside_it(base: Path, fine: Path, tmp_path: Path) -> None:
    """DARE draws 16-bit values of single weights, in as many bytes as the linear weights have here."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    options = {"drop": 0.5, "codec": "int8", "block": 4}
    receipt = compress(base, fine, tmp_path / "out", method="magnitude", options=options, evaluate=text)
    report = open_artifact(tmp_path / "out").manifest.quality
    assert report is not None
    size, dare = report["bytes"], report["dare"]
    assert isinstance(size, dict)
    assert isinstance(dare, dict)
    header = open_artifact(tmp_path / "out").header_bytes
    assert sum(map(int, size.values())) + header == receipt.size_bytes  # type: ignore[arg-type]
    assert size["indices"] > 0  # type: ignore[operator]
    assert dare["bytes"] == pytest.approx(receipt.size_bytes, rel=0.1)
    asked = dict(option.split("=") for option in str(dare["made_by"]).split()[1:])
    assert (asked["block"], asked["codec"], asked["rank"]) == ("1", "bf16", "4")
    own = {"drop": float(asked["drop"]), "block": 1, "codec": "bf16"}
    plain = compress(base, fine, tmp_path / "dare", method="dare", options=own, evaluate=text)
    assert plain.quality is not None
    assert plain.quality.kl_mean == pytest.approx(dare["kl_mean"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lora"}, "lora cannot store a full checkpoint; use one of: weighted, dare, darex, .*, lossless"),
        ({"method": "best"}, "known are"),
        ({"method": "lossless", "options": {"rank": 3}}, "no option rank"),
        ({"method": "dare", "calibration": Path("x.txt")}, "runs no text"),
        ({"calibration": Path("nowhere.txt")}, "Cannot read the text file nowhere.txt"),
        ({"evaluate": Path("nowhere.txt")}, "Cannot read the text file nowhere.txt"),
    ],
)
def test_a_refusal_leaves_no_file(
    options: dict[str, object], message: str, base: Path, fine: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        compress(base, fine, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_an_output_that_cannot_be_written_is_refused_first(base: Path, fine: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is a folder"):
        compress(base, fine, tmp_path)
    with pytest.raises(OptionError, match="does not exist"):
        compress(base, fine, tmp_path / "nowhere" / "out")


@pytest.mark.parametrize("method", ["dare", "lossless"])
def test_a_convolution_is_refused_by_name(method: str, tmp_path: Path) -> None:
    sizes = MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1)
    model = MambaForCausalLM(sizes)
    base, fine = save(model, tmp_path / "base"), save(fine_tuned(model), tmp_path / "fine")
    with pytest.raises(UnsupportedCheckpoint, match=r"conv1d.weight has shape \[64, 1, 4\]"):
        compress(base, fine, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


def test_a_broken_file_beside_the_weights_is_named(base: Path, tmp_path: Path) -> None:
    fine = save(fine_tuned(tiny_llama()), tmp_path / "fine", vocab=64)
    (fine / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json is no valid JSON"):
        compress(base, fine, tmp_path / "out", method="dare", measure=False)
    with pytest.raises(CheckpointError, match=r"fine has no tokenizer that can be loaded: Expecting property name"):
        compress(base, fine, tmp_path / "out", method="dare")


def test_lossless_is_not_for_adapters(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(OptionError, match=r"cannot store a LoRA adapter; use one of: weighted, dare, .*, lora"):
        compress(base, adapter, tmp_path / "out", method="lossless")


def test_bad_conversations_are_named_by_line(base: Path, fine: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    good = json.dumps({"prompt": "a", "answer": "b"})
    for bad in ('{"prompt": "a"}', "not json", '{"messages": [{"role": "user", "content": "a"}]}'):
        text.write_text(f"{good}\n{bad}\n")
        with pytest.raises(DeltaServeError, match="line 2"):
            compress(base, fine, tmp_path / "out", method="dare", evaluate=text)
    assert not (tmp_path / "out").exists()
