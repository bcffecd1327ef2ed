"""The quality report, against a direct computation with the models."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import fine_tuned, save, tiny_llama, tiny_tokenizer
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.fine_tune import open_fine_tune
from deltaserve.delta_store.merge import merge
from deltaserve.delta_store.quality import Quality, measure
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
    return measure(checkpoint, open_fine_tune(fine, checkpoint), open_artifact(artifact), None, samples)


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
    assert found.loss_base is None
    assert found.kl_mean == 0


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
