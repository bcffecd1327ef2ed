"""Layers one at a time give the whole model's figures; which of the two it is goes by what memory is free."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import fine_tuned, save, tiny_gpt2, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
)

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.fine_tune import open_fine_tune
from deltaserve.delta_store.profile import profile_of
from deltaserve.delta_store.quality import Judge, Quality, outputs
from deltaserve.delta_store.running import memory
from deltaserve.delta_store.running.layers import Layerwise
from deltaserve.delta_store.running.memory import runner_for
from deltaserve.delta_store.running.weights import of_artifact, of_base, of_fine_tune
from deltaserve.delta_store.running.whole import Whole
from deltaserve.delta_store.selection.bench import Bench
from deltaserve.delta_store.text import Sample

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("own_cache")]

SAMPLES = [Sample((1, 5, 9, 23, 40, 63, 2, 17), 3), Sample((4, 4, 31, 8)), Sample((7, 2, 9), 2)]


def adapter(base: Path, folder: Path) -> Path:
    torch.manual_seed(3)
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


def untied(model: Any) -> Any:
    """The same with a head of its own."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(1.5 * model.lm_head.weight.detach())
    return model


def grown(model: Any) -> Any:
    model.resize_token_embeddings(67)
    return model


CASES = {
    "tied": (tiny_llama, lambda base, folder: save(fine_tuned(tiny_llama()), folder)),
    "untied": (lambda: tiny_llama(tied=False), lambda base, folder: save(fine_tuned(tiny_llama(tied=False)), folder)),
    "head of its own": (tiny_llama, lambda base, folder: save(untied(fine_tuned(tiny_llama())), folder)),
    "added tokens": (tiny_llama, lambda base, folder: save(grown(fine_tuned(tiny_llama())), folder)),
    "transposed": (tiny_gpt2, lambda base, folder: save(fine_tuned(tiny_gpt2()), folder)),
    "adapter": (lambda: tiny_llama(tied=False), adapter),
}


@pytest.mark.parametrize("case", CASES)
def test_layers_give_the_whole_models_figures(case: str, tmp_path: Path) -> None:
    """Of base, fine-tune and artifact, with weighted drop; samples of several lengths. An adapter is stored exactly."""
    make_base, make_fine = CASES[case]
    base = save(make_base(), tmp_path / "base")
    fine = make_fine(base, tmp_path / "fine")
    method, options = ("lora", {}) if case == "adapter" else ("weighted", {"drop": 0.5, "block": 4})
    compress(base, fine, tmp_path / "out", method=method, options=options)
    checkpoint, artifact = open_checkpoint(base), open_artifact(tmp_path / "out")
    tune, profile = open_fine_tune(fine, checkpoint), profile_of(artifact)
    for weights in (of_base(checkpoint), of_fine_tune(tune), of_artifact(checkpoint, artifact, profile)):
        whole, layers = (runner.run(weights, SAMPLES, outputs) for runner in (Whole(), Layerwise()))
        for one, other in zip(whole, layers, strict=True):
            torch.testing.assert_close(other, one, atol=1e-5, rtol=0)
    one, other = (Judge(checkpoint, tune, SAMPLES, r).quality(artifact, profile) for r in (Whole(), Layerwise()))
    same(one, other)
    points = [Bench(checkpoint, tune, r).measure(artifact, profile, SAMPLES) for r in (Whole(), Layerwise())]
    assert points[0].kl == pytest.approx(points[1].kl, abs=1e-5)
    assert points[0].kl == pytest.approx(one.kl_mean, abs=1e-5)
    assert points[0].loss == pytest.approx(points[1].loss, abs=1e-5)
    assert one.kl_mean > 1e-5 or case == "adapter"


def same(one: Quality, other: Quality) -> None:
    """``gain_kept`` divides by a small difference of losses."""
    for name in Quality.__dataclass_fields__:
        expected, found = getattr(one, name), getattr(other, name)
        allowed = 1e-4 if name == "gain_kept" else 1e-5
        assert found == (expected if expected is None else pytest.approx(expected, abs=allowed)), name


def test_a_whole_model_is_run_again_with_other_weights(tmp_path: Path) -> None:
    """The kept one's every weight is overwritten, and one of another form is made anew."""
    models = [tiny_llama(), fine_tuned(tiny_llama()), tiny_llama(tied=False), tiny_gpt2()]
    runner = Whole()
    for i, model in enumerate(models):
        checkpoint = open_checkpoint(save(model, tmp_path / str(i)))
        found = runner.run(of_base(checkpoint), SAMPLES, outputs)
        with torch.no_grad():
            torch.testing.assert_close(found[0], outputs(model, SAMPLES[0]), atol=1e-6, rtol=0)


def test_a_classifier_is_run_by_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    base = BertModel(sizes).eval()
    classifier = BertForSequenceClassification(sizes).eval()
    classifier.bert.load_state_dict(fine_tuned(base, scale=0.1).state_dict())
    folders = save(base, tmp_path / "base", vocab=64), save(classifier, tmp_path / "fine", vocab=64)
    lines = [{"text": text, "label": i % 2} for i, text in enumerate(["hello", "a b c", "good morning", "no"])]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(map(json.dumps, lines)))
    options = {"drop": 0.5, "block": 4}
    one, other = (
        compress(*folders, tmp_path / how, method="weighted", options=options, evaluate=text, memory=how)
        for how in ("whole", "layers")
    )
    assert (one.memory, other.memory) == ("whole, as asked", "layers, as asked")
    assert one.quality is not None
    assert other.quality is not None
    same(one.quality, other.quality)


def test_each_weight_is_read_once_for_all_samples_and_none_stays(tmp_path: Path) -> None:
    base = open_checkpoint(save(tiny_llama(tied=False), tmp_path / "base"))
    read: list[str] = []
    held: list[Any] = []

    def stored(name: str) -> torch.Tensor:
        read.append(name)
        return base.read(name)

    def look(model: Any, sample: Sample) -> torch.Tensor:
        held.append(model)
        return outputs(model, sample)

    Layerwise().run(replace(of_base(base), stored=stored), SAMPLES, look)
    assert sorted(read) == sorted(base.names)
    assert all(parameter.device.type == "meta" for parameter in held[0].parameters())


def test_a_model_that_reaches_around_its_layers_is_refused(tmp_path: Path) -> None:
    """DeBERTa takes its relative positions' weight without calling the layer that holds it."""
    sizes = DebertaV2Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    )
    base = open_checkpoint(save(DebertaV2ForSequenceClassification(sizes), tmp_path / "base"))
    samples = [Sample((1, 5, 9), label=0)]
    assert Whole().run(of_base(base), samples, outputs)[0].shape == (1, 2)
    with pytest.raises(OptionError, match="DebertaV2ForSequenceClassification uses weights outside"):
        Layerwise().run(of_base(base), samples, outputs)


def test_a_failure_in_the_middle_is_the_callers(tmp_path: Path) -> None:
    base = open_checkpoint(save(tiny_llama(), tmp_path / "base"))

    def look(model: Any, sample: Sample) -> torch.Tensor:
        if sample is SAMPLES[1]:
            outputs(model, sample)
            raise ValueError("of this sample")
        return outputs(model, sample)

    with pytest.raises(ValueError, match="of this sample"):
        Layerwise().run(of_base(base), SAMPLES, look)


def test_auto_goes_by_what_is_free(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 8_000_000_000)
    with caplog.at_level(logging.INFO):
        assert isinstance(runner_for("auto", 1_000_000_000)[0], Whole)
        found, why = runner_for("auto", 1_000_000_001)
    assert isinstance(found, Layerwise)
    assert why == "layers: 4.0 GB in float32 is more than half of the 8.0 GB that are free"
    assert why in caplog.text
    assert isinstance(runner_for("whole", 10**12)[0], Whole)
    assert isinstance(runner_for("layers", 1)[0], Layerwise)
    with pytest.raises(OptionError, match="Unknown memory 'half'; known are: auto, whole, layers"):
        runner_for("half", 1)


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    of_machine = memory.free_bytes()
    assert of_machine > 1_000_000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 200000\n")
    assert memory.free_bytes() == pytest.approx(of_machine, rel=0.5)
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.free_bytes() == 500_000


def test_without_anything_to_measure_memory_is_refused_by_value(base: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=re.escape("Unknown memory 'x'")):
        compress(base, base, tmp_path / "out", method="dare", memory="x")
    assert not (tmp_path / "out").exists()
