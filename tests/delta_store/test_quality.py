"""The quality report, against a direct computation with the models."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_models import fine_tuned, save, tiny_llama, tiny_tokenizer
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

from deltaserve.delta_store.calibration import profile_for
from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.fine_tune import open_fine_tune
from deltaserve.delta_store.merge import merge
from deltaserve.delta_store.quality import Judge, Quality
from deltaserve.delta_store.running.whole import Whole
from deltaserve.delta_store.text import Sample, read_samples, windows

SAMPLES = [Sample((1, 5, 9, 23, 40, 63, 2, 17), 3), Sample((4, 4, 31, 8))]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(), tmp_path_factory.mktemp("base"))


def measured(base: Path, fine: Path, artifact: Path, samples: list[Sample] = SAMPLES) -> Quality:
    checkpoint = open_checkpoint(base)
    return Judge(checkpoint, open_fine_tune(fine, checkpoint), samples, Whole()).quality(open_artifact(artifact), None)


def scored(folder: Path) -> torch.Tensor:
    """Logits of every scored token of ``SAMPLES``."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([s.ids])).logits[0, s.start - 1 : -1] for s in SAMPLES])


def test_it_is_what_the_models_themselves_say(base: Path, tmp_path: Path) -> None:
    fine = save(fine_tuned(tiny_llama()), tmp_path / "fine")
    compress(base, fine, tmp_path / "artifact", method="dare", options={"drop": 0.5})
    found = measured(base, fine, tmp_path / "artifact")
    merged = merge(base, tmp_path / "artifact", tmp_path / "merged").folder
    targets = torch.tensor([token for s in SAMPLES for token in s.ids[s.start :]])
    wanted, given = scored(fine), scored(merged)
    divergence = kl_div(log_softmax(given, -1), log_softmax(wanted, -1), log_target=True, reduction="none").sum(1)
    assert found.tokens == len(targets) == 8
    assert found.kl_mean == pytest.approx(divergence.mean().item(), abs=1e-6)
    assert found.kl_p99 == pytest.approx(divergence.double().quantile(0.99).item(), abs=1e-6)
    assert found.top1_agreement == (wanted.argmax(1) == given.argmax(1)).double().mean()
    for loss, logits in (
        (found.loss_base, scored(base)),
        (found.loss_fine_tuned, wanted),
        (found.loss_artifact, given),
    ):
        assert loss == pytest.approx(cross_entropy(logits, targets).item(), abs=1e-5)
    assert found.kl_mean > 1e-4
    of_base = kl_div(log_softmax(scored(base), -1), log_softmax(wanted, -1), log_target=True, reduction="none").sum(1)
    assert found.kl_base == pytest.approx(of_base.mean().item(), abs=1e-6)
    assert found.top1_agreement_base == (wanted.argmax(1) == scored(base).argmax(1)).double().mean()
    gained = cross_entropy(scored(base), targets) - cross_entropy(wanted, targets)
    kept = (cross_entropy(scored(base), targets) - cross_entropy(given, targets)) / gained
    assert found.gain_kept == (pytest.approx(kept.item(), abs=1e-3) if gained > 0 else None)


def test_lossless_loses_nothing(base: Path, tmp_path: Path) -> None:
    fine = save(fine_tuned(tiny_llama()), tmp_path / "fine")
    compress(base, fine, tmp_path / "artifact", method="lossless")
    found = measured(base, fine, tmp_path / "artifact")
    assert (found.kl_mean, found.kl_p99, found.top1_agreement) == (0, 0, 1)
    assert found.loss_artifact == found.loss_fine_tuned != found.loss_base


def test_added_tokens_have_no_loss_under_the_base(base: Path, tmp_path: Path) -> None:
    model = fine_tuned(tiny_llama())
    model.resize_token_embeddings(67)
    fine = save(model, tmp_path / "fine")
    compress(base, fine, tmp_path / "artifact", method="lossless")
    found = measured(base, fine, tmp_path / "artifact", [Sample((1, 66, 5))])
    assert (found.loss_base, found.kl_base, found.gain_kept) == (None, None, None)
    assert found.kl_mean == 0
    found = measured(base, fine, tmp_path / "artifact")
    assert found.loss_base is not None  # none of the text's tokens is new
    assert found.kl_base is None  # but the fine-tune thinks new ones possible


def test_prose_is_cut_into_windows_spread_over_it() -> None:
    tokenizer = tiny_tokenizer(64)
    samples = windows("abcdefghij" * 200, tokenizer, 600)
    assert [len(s.ids) for s in samples] == [256, 256]
    assert samples[0].start == 1
    assert samples[1].ids[0] == tokenizer("abcdefghij" * 200).input_ids[1000]


def test_of_a_conversation_only_the_answer_counts(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(64)
    question, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    file = tmp_path / "text.jsonl"
    lines = [{"prompt": "hi", "answer": "yes"}, {"messages": [question, answer]}]
    file.write_text("\n".join(map(json.dumps, lines)))
    one, other = read_samples(file, tokenizer, 1000)
    assert one == other
    assert tokenizer.decode(one.ids[: one.start]) == "user: hi\nassistant: "
    assert tokenizer.decode(one.ids[one.start :]) == "yes<|end|>"
    assert len(read_samples(file, tokenizer, 5)) == 1


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bare encoder, and a fine-tune of it that tells two classes apart; both with a tokenizer."""
    torch.manual_seed(0)
    sizes = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    base = BertModel(sizes).eval()
    classifier = BertForSequenceClassification(sizes).eval()
    classifier.bert.load_state_dict(fine_tuned(base, scale=0.1).state_dict())
    folder = tmp_path_factory.mktemp("encoders")
    return save(base, folder / "base", vocab=64), save(classifier, folder / "fine", vocab=64)


def test_a_classifier_is_judged_by_its_classes(encoders: tuple[Path, Path], tmp_path: Path) -> None:
    base, fine = encoders
    texts = ["hello", "a b c", "good morning", "no"]
    lines = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "artifact"
    options = {"drop": 0.5, "block": 4}
    receipt = compress(base, fine, out, method="weighted", options=options, evaluate=tmp_path / "text.jsonl")
    merged = merge(base, out, tmp_path / "merged").folder
    wanted, given = (classes(folder, texts) for folder in (fine, merged))
    found, labels = receipt.quality, torch.tensor([0, 1, 0, 1])
    assert found is not None
    assert (found.tokens, found.loss_base) == (4, None)
    divergence = kl_div(log_softmax(given, -1), log_softmax(wanted, -1), log_target=True, reduction="none").sum(1)
    assert found.kl_mean == pytest.approx(divergence.mean().item(), abs=1e-6)
    assert found.kl_mean > 1e-5
    assert found.loss_fine_tuned == pytest.approx(cross_entropy(wanted, labels).item(), abs=1e-5)
    assert found.loss_artifact == pytest.approx(cross_entropy(given, labels).item(), abs=1e-5)


def classes(folder: Path, texts: list[str]) -> torch.Tensor:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), tiny_tokenizer(64)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([tokenizer(text).input_ids])).logits for text in texts])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "hello", "label": 2}, "has label 2, but BertForSequenceClassification has 2 classes"),
        ({"text": "hello", "label": -1}, "greater than or equal to 0"),
        ({"text": "hello"}, 'for an encoder "text" and "label"'),
        ({"prompt": "hi", "answer": "yes"}, 'it takes lines of {"text": ..., "label": ...}'),
    ],
)
def test_text_that_a_classifier_cannot_answer_is_refused(
    line: dict[str, object], message: str, encoders: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps(line))
    with pytest.raises(OptionError, match=re.escape(message)):
        compress(*encoders, tmp_path / "out", evaluate=tmp_path / "text.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_decoder_has_no_classes(base: Path, tmp_path: Path) -> None:
    fine = save(fine_tuned(tiny_llama()), tmp_path / "fine", vocab=64)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "hello", "label": 0}))
    with pytest.raises(OptionError, match="has label 0, but LlamaForCausalLM has 0 classes"):
        compress(base, fine, tmp_path / "out", evaluate=tmp_path / "text.jsonl")


def test_the_profile_of_an_encoder_reaches_its_layers_and_no_head(encoders: tuple[Path, Path], tmp_path: Path) -> None:
    """So a fine-tune with a head of its own is dropped by the inputs' strength, under the base's names."""
    base = open_checkpoint(encoders[0])
    profile = profile_for(base, "fingerprint", None, None)
    reached = {name for name in base.names if name.endswith("weight") and len(base.shape(name)) == 2}
    assert set(profile.vector_of) == {name for name in reached if "embeddings" not in name}
