"""Fine-tunes of an encoder whose head its base lacks, or has for other labels: into an artifact and back."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import fine_tuned, save
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import open_artifact, write_artifact
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.errors import UnsupportedArtifact, UnsupportedCheckpoint
from deltaserve.delta_store.fingerprint import fingerprint
from deltaserve.delta_store.heads import CONFIG, variant_architecture
from deltaserve.delta_store.merge import merge

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
LABELS = {0: "bad", 1: "good", 2: "neither"}
IDS = torch.tensor([[2, 5, 9, 23, 40, 63, 3]])


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def bert(kind: type[PreTrainedModel], seed: int = 0, **settings) -> PreTrainedModel:
    torch.manual_seed(seed)
    return kind(BertConfig(**SIZES | settings)).eval()


def classifier_of(base: PreTrainedModel, labels: dict[int, str] = LABELS) -> PreTrainedModel:
    """A fine-tune of the base's body under a new head."""
    model = bert(BertForSequenceClassification, 1, id2label=labels)
    model.bert.load_state_dict(base.base_model.state_dict(), strict=False)
    return fine_tuned(model)


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForSequenceClassification])
@pytest.mark.parametrize("method", ["lossless", "dare"])
def test_a_head_that_the_base_lacks_comes_back_exactly(tmp_path: Path, kind: type, method: str) -> None:
    base = bert(kind)  # a BertForMaskedLM has no pooler either; the classifier has one for two labels
    fine = classifier_of(base)
    folders = save(base, tmp_path / "base"), save(fine, tmp_path / "fine")
    options = {"drop": 0.0, "codec": "bf16", "rank": 16} if method == "dare" else {}
    compress(*folders, tmp_path / "a.safetensors", method=method, options=options)
    merge(folders[0], tmp_path / "a.safetensors", tmp_path / "merged")

    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert again.config.id2label == LABELS
    assert type(again) is BertForSequenceClassification
    assert torch.equal(again.classifier.weight, fine.classifier.weight)
    assert torch.equal(again.bert.pooler.dense.weight, fine.bert.pooler.dense.weight) or kind is not BertForMaskedLM
    with torch.no_grad():
        difference = (again(IDS).logits - fine(IDS).logits).abs().max()
    assert difference == 0 if method == "lossless" else difference < 2e-3


def test_the_body_alone_of_a_base_with_a_head(tmp_path: Path) -> None:
    base = bert(BertForSequenceClassification)
    fine = fine_tuned(base.bert)
    folders = save(base, tmp_path / "base"), save(fine, tmp_path / "fine")
    compress(*folders, tmp_path / "a.safetensors", method="lossless")
    artifact = open_artifact(tmp_path / "a.safetensors")
    assert all(name.startswith("bert.") for name in artifact.names)
    merge(folders[0], tmp_path / "a.safetensors", tmp_path / "merged")
    assert torch.equal(BertModel.from_pretrained(tmp_path / "merged")(IDS)[0], fine(IDS)[0])


def test_a_fine_tune_with_the_base_s_own_head_brings_no_configuration(tmp_path: Path) -> None:
    base = bert(BertForSequenceClassification)
    folders = save(base, tmp_path / "base"), save(fine_tuned(base), tmp_path / "fine")
    compress(*folders, tmp_path / "a.safetensors", method="lossless")
    artifact = open_artifact(tmp_path / "a.safetensors")
    assert artifact.file_names == ()
    assert variant_architecture(open_checkpoint(folders[0]).architecture, artifact).name == type(base).__name__


def test_an_encoder_of_another_size_is_refused(tmp_path: Path) -> None:
    base, other = bert(BertModel), bert(BertForSequenceClassification, num_hidden_layers=3)
    folders = save(base, tmp_path / "base"), save(other, tmp_path / "fine")
    with pytest.raises(UnsupportedCheckpoint, match=r"num_hidden_layers \(2 in the base, 3 in the fine-tune\)"):
        compress(*folders, tmp_path / "a.safetensors", method="lossless")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_hidden_layers": 10**9}, "differs from the base's in num_hidden_layers"),
        ({"architectures": ["BertForQuestionAnswering"]}, "only variants that classify whole texts"),
        ({"architectures": None}, "only variants that classify whole texts"),
        ({"id2label": {"0": "a", "7": "b"}}, "not numbered from 0 on"),
        ({"id2label": {}}, "id2label of 1 to 65536"),
        ({"id2label": {str(i): "x" for i in range(70000)}}, "id2label of 1 to 65536"),
    ],
)
def test_a_configuration_that_asks_for_another_model_is_refused(tmp_path: Path, change: dict, told: str) -> None:
    base = save(bert(BertModel), tmp_path / "base")
    checkpoint = open_checkpoint(base)
    sound = BertConfig(**SIZES, id2label=LABELS).to_dict() | {"architectures": ["BertForSequenceClassification"]}
    path = tmp_path / "a.safetensors"
    for settings in (sound, sound | change):
        files = {CONFIG: json.dumps(settings).encode()}
        write_artifact(path, base=fingerprint(checkpoint), tied_head=False, parts=[], files=files)
        if settings is sound:
            assert variant_architecture(checkpoint.architecture, open_artifact(path)).config.id2label == LABELS
    with pytest.raises(UnsupportedArtifact, match=told):
        variant_architecture(checkpoint.architecture, open_artifact(path))


def test_what_training_told_the_tokenizer_about_cutting_is_no_difference(tmp_path: Path) -> None:
    base, fine = save(bert(BertModel), tmp_path / "base", vocab=64), save(bert(BertModel, 1), tmp_path / "fine")
    told = json.loads((base / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (fine / "tokenizer.json").write_text(json.dumps(told | {"truncation": cut}))
    compress(base, fine, tmp_path / "a.safetensors", method="lossless")
    assert open_artifact(tmp_path / "a.safetensors").file_names == ()
