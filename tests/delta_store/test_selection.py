"""Selecting on real small models: the known best of constructed fine-tunes, tolerances kept, resuming, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import fine_tuned, save, tiny_llama
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.errors import ToleranceMissed
from deltaserve.delta_store.fine_tune import open_fine_tune
from deltaserve.delta_store.merge import merge
from deltaserve.delta_store.pruning.methods import KEPT
from deltaserve.delta_store.selection.bench import Bench
from deltaserve.delta_store.selection.delta_size import delta_size
from deltaserve.delta_store.selection.select import Selection, select
from deltaserve.delta_store.selection.texts import Files, read_texts
from deltaserve.delta_store.selection.tolerance import Tolerance
from deltaserve.delta_store.text import read_samples, tokenizer_of

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("own_cache")]
TEN_PERCENT = Tolerance("max_kl", 0.1, relative=True)
ONE: dict[str, Any] = {"method": "weighted", "options": {"codec": "int4", "block": 16}}
"""A narrow search, where what is searched does not matter."""

SENTENCES = ("the quick brown fox", "a lazy dog sleeps here", "seven words make up this small line", "go on then")


def conversations(path: Path, count: int, shift: int = 0) -> Path:
    lines = [{"prompt": SENTENCES[i % 4], "answer": f"{SENTENCES[(i + shift) % 4]} {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return conversations(tmp_path / "text.jsonl", 24)


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linear weights moved at random, everything else as it was."""
    model = tiny_llama()
    moved = fine_tuned(model, scale=0.01)
    moved.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    return save(moved, tmp_path_factory.mktemp("fine"), vocab=64)


@torch.no_grad()
def moved(folder: Path, delta_of: object) -> Path:
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter += delta_of(parameter)  # type: ignore[operator]
    return save(model, folder, vocab=64)


def run(base: Path, fine: Path, out: Path, text: Path, tolerance: Tolerance = TEN_PERCENT, **more: object) -> Selection:
    return select(base, fine, out, tolerance, files=Files(text, None), **more)  # type: ignore[arg-type]


def test_a_delta_of_rank_one_goes_to_low_rank(base: Path, text: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    fine = moved(tmp_path / "fine", lambda p: 0.02 * torch.randn(len(p), 1) @ torch.randn(1, p.shape[1]))
    found = run(base, fine, tmp_path / "out", text)
    assert found.met
    assert "linear_rank=1" in found.chosen
    assert found.receipt.method == "low-rank"
    assert found.report["kl_mean"] < 0.01 * found.report["kl_base"]  # type: ignore[operator]


def test_a_delta_in_one_column_a_row_goes_to_importance(base: Path, text: Path, tmp_path: Path) -> None:
    """Another column in each row, so that the rank is not low."""
    generator = torch.Generator().manual_seed(6)

    def columns(parameter: torch.Tensor) -> torch.Tensor:
        at = torch.randint(parameter.shape[1], (len(parameter), 1), generator=generator)
        signs = torch.randint(2, (len(parameter), 1), generator=generator) - 0.5
        return torch.zeros_like(parameter).scatter(1, at, 0.3 * signs)

    found = run(base, moved(tmp_path / "fine", columns), tmp_path / "out", text)
    assert found.met
    assert found.receipt.method == "magnitude"


def test_the_tolerance_is_kept_and_the_report_is_what_the_models_say(
    base: Path, fine: Path, text: Path, tmp_path: Path
) -> None:
    """Everything recomputed from the written file, merged and run by transformers alone."""
    held_out = conversations(tmp_path / "held-out.jsonl", 12, shift=1)
    out = tmp_path / "out"
    found = select(base, fine, out, TEN_PERCENT, files=Files(text, held_out), **ONE)
    samples = read_samples(held_out, tokenizer_of(base), 10_000)
    targets = torch.tensor([token for s in samples for token in s.ids[s.start :]])

    def logits(folder: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            return torch.cat([model(torch.tensor([s.ids])).logits[0, s.start - 1 : -1] for s in samples])

    wanted, bare = logits(fine), logits(base)
    given = logits(merge(base, out, tmp_path / "merged").folder)

    def divergence(other: torch.Tensor) -> torch.Tensor:
        return kl_div(log_softmax(other, -1), log_softmax(wanted, -1), log_target=True, reduction="none").sum(1)

    report = open_artifact(out).manifest.quality
    assert report == json.loads(json.dumps(found.report))
    assert report is not None
    assert report["tokens"] == len(targets)
    assert report["kl_mean"] == pytest.approx(divergence(given).mean().item(), rel=1e-3)
    assert report["kl_p99"] == pytest.approx(divergence(given).double().quantile(0.99).item(), rel=1e-3)
    assert report["kl_base"] == pytest.approx(divergence(bare).mean().item(), rel=1e-3)
    assert report["top1_agreement"] == (wanted.argmax(1) == given.argmax(1)).double().mean()
    losses = [cross_entropy(each, targets).item() for each in (bare, wanted, given)]
    assert [report[f"loss_{name}"] for name in ("base", "fine_tuned", "artifact")] == pytest.approx(losses, abs=1e-5)
    assert report["kl_mean"] <= 0.1 * report["kl_base"]  # type: ignore[operator]
    assert found.met


def test_plain_dare_seeds_and_bytes_are_measured_not_copied(base: Path, fine: Path, text: Path, tmp_path: Path) -> None:
    given = {"codec": "int4", "block": 4, "seed": 7}
    found = run(base, fine, tmp_path / "out", text, method="weighted", options=given)
    options = open_artifact(tmp_path / "out").manifest.provenance["options"]
    report = found.report
    assert set(report["seeds"]) == {"7", "8", "9"}  # type: ignore[arg-type]
    assert report["seeds"]["7"]["kl_mean"] == report["kl_mean"]  # type: ignore[index, call-overload]
    checkpoint = open_checkpoint(base)
    samples = read_texts(Files(text, None), checkpoint, open_fine_tune(fine, checkpoint))["held-out"]
    bench = Bench(checkpoint, open_fine_tune(fine, checkpoint))
    other = compress(base, fine, tmp_path / "other", method="weighted", options={**options, "seed": 8})  # type: ignore[dict-item]
    again = bench.measure(open_artifact(other.path), _profile(other.path), samples)
    assert report["seeds"]["8"]["kl_mean"] == pytest.approx(again.kl, rel=1e-4)  # type: ignore[index, call-overload]
    dare = report["dare"]
    drop = float(dare["made_by"].split("drop=")[1].split()[0])  # type: ignore[index, union-attr, call-overload]
    kept = {name: options[name] for name in KEPT}  # type: ignore[index, call-overload]
    plain = {"drop": drop, "block": 1, "codec": "bf16", **kept}
    receipt = compress(base, fine, tmp_path / "dare", method="dare", options=plain, measure=False)  # type: ignore[arg-type]
    assert dare["bytes"] == pytest.approx(receipt.size_bytes, abs=64)  # type: ignore[index, call-overload]
    assert dare["kl_mean"] == pytest.approx(bench.measure(open_artifact(receipt.path), None, samples).kl, rel=1e-4)  # type: ignore[index, call-overload]
    sizes = report["bytes"]
    header = open_artifact(tmp_path / "out").header_bytes
    assert sum(sizes.values()) + header == found.receipt.size_bytes  # type: ignore[union-attr]
    assert sizes["indices"] == 0  # type: ignore[index, call-overload]


def _profile(path: str) -> object:
    from deltaserve.delta_store.profile import profile_of

    return profile_of(open_artifact(path))


def test_indices_are_counted(base: Path, fine: Path, text: Path, tmp_path: Path) -> None:
    found = run(base, fine, tmp_path / "out", text, Tolerance("max_kl", 0.5, relative=True), method="magnitude")
    sizes = found.report["bytes"]
    assert sizes["indices"] > 100  # type: ignore[index, call-overload, operator]
    assert sizes["embeddings"] == 0  # type: ignore[index, call-overload]


def test_interrupted_it_goes_on_without_measuring_again(
    base: Path, fine: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    original = Bench.measure

    def counted(self: Bench, artifact: object, profile: object, samples: object) -> object:
        if len(measured) == 7:
            measured.append("interrupted")
            raise KeyboardInterrupt
        measured.append("measured")
        return original(self, artifact, profile, samples)  # type: ignore[arg-type]

    whole = run(base, fine, tmp_path / "out", text, **ONE)
    digest, tried = whole.receipt.digest, whole.tried
    for path in tmp_path.glob("out*"):
        path.unlink()
    monkeypatch.setattr(Bench, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        run(base, fine, tmp_path / "out", text, **ONE)
    assert sorted(p.name for p in tmp_path.glob("*out*")) == ["out.search.jsonl"]
    with (tmp_path / "out.search.jsonl").open("a") as file:
        file.write('["half a li')
    again = run(base, fine, tmp_path / "out", text, **ONE)
    assert again.receipt.digest == digest
    assert again.tried == tried
    assert measured.count("measured") == sum(1 for line in _journal(tmp_path) if line[0] != "base")
    before = len(measured)
    assert run(base, fine, tmp_path / "out", text, **ONE).receipt.digest == digest
    assert len(measured) == before


def _journal(folder: Path) -> list[list[object]]:
    lines = (folder / "out.search.jsonl").read_text().splitlines()[1:]
    return [json.loads(line) for line in lines if line.endswith("]")]


def test_another_text_begins_another_search(base: Path, fine: Path, text: Path, tmp_path: Path) -> None:
    options = {"method": "dense", "options": {"codec": "int2"}, "tolerance": Tolerance("max_kl", 5.0)}
    run(base, fine, tmp_path / "out", text, **options)
    assert run(base, fine, tmp_path / "out", text, **options).resumed > 0
    other = conversations(tmp_path / "other.jsonl", 24, shift=2)
    assert run(base, fine, tmp_path / "out", other, **options).resumed == 0


def test_the_same_seed_gives_the_same_file(base: Path, fine: Path, text: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (run(base, fine, tmp_path / name / "out", text, **ONE) for name in ("one", "two"))
    assert (one.receipt.digest, one.path) == (two.receipt.digest, two.path)
    other = run(base, fine, tmp_path / "out", text, method="weighted", options={**ONE["options"], "seed": 5})
    assert other.receipt.digest != one.receipt.digest


def test_every_point_is_drawn_beside_the_artifact(base: Path, fine: Path, text: Path, tmp_path: Path) -> None:
    options = {"method": "dense", "options": {"codec": "int2"}, "tolerance": Tolerance("max_kl", 5.0)}
    found = run(base, fine, tmp_path / "out", text, **options)
    assert found.plot == str(tmp_path / "out.search.png")
    assert Path(found.plot).read_bytes().startswith(b"\x89PNG")
    found = run(base, fine, tmp_path / "out", text, plot=tmp_path / "plot.svg", **options)
    assert found.plot == str(tmp_path / "plot.svg")
    points = [line for line in _journal(tmp_path) if line[0] != "base"]
    assert (tmp_path / "plot.svg").read_text().count("<use ") >= len(points)


def test_a_tolerance_that_nothing_meets_writes_nothing(base: Path, fine: Path, text: Path, tmp_path: Path) -> None:
    options = {"tolerance": Tolerance("max_kl", 1e-9), "method": "weighted", "options": {"codec": "sign"}}
    with pytest.raises(
        ToleranceMissed, match=r"Nothing is within the tolerance .* Nearest: weighted .* bytes, KL .*--force"
    ):
        run(base, fine, tmp_path / "out", text, **options)
    assert not (tmp_path / "out").exists()
    forced = run(base, fine, tmp_path / "out", text, force=True, **options)
    assert not forced.met
    assert forced.report["tolerance"] == {"asked": "KL at most 1e-09", "met": False}
    assert any("it was forced" in warning for warning in forced.receipt.warnings)


def test_a_byte_budget_is_spent_on_the_least_kl(base: Path, fine: Path, text: Path, tmp_path: Path) -> None:
    budget = 16_000
    found = run(base, fine, tmp_path / "out", text, Tolerance("bytes", budget))
    assert found.receipt.size_bytes <= budget
    first = compress(base, fine, tmp_path / "other", method="dare", options={"drop": 0.8, "codec": "int2", "block": 16})
    assert first.size_bytes < budget
    checkpoint = open_checkpoint(base)
    samples = read_texts(Files(text, None), checkpoint, open_fine_tune(fine, checkpoint))["held-out"]
    plain = Bench(checkpoint, open_fine_tune(fine, checkpoint)).measure(open_artifact(first.path), None, samples)
    assert found.report["kl_mean"] < plain.kl  # type: ignore[operator]


def test_a_task_is_scored_by_the_greedy_answer(base: Path, fine: Path, tmp_path: Path) -> None:
    """Answers are what the fine-tune itself generates, so it scores 1; the bare base less, or nothing is to be seen."""
    tokenizer, model = tokenizer_of(base), AutoModelForCausalLM.from_pretrained(fine).eval()
    tokenizer.eos_token = None
    folders = [tmp_path / "base", tmp_path / "fine"]
    for source, folder in zip((base, fine), folders, strict=True):
        tokenizer.save_pretrained(folder)
        for name in ("model.safetensors", "config.json"):
            (folder / name).write_bytes((source / name).read_bytes())
    lines = []
    for i in range(60):
        prompt = f"{SENTENCES[i % 4]} {i}"
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(asked, add_special_tokens=False, return_tensors="pt").input_ids
        given = model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
        lines.append({"prompt": prompt, "answer": tokenizer.decode(given)})
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = Files(task, None, is_task=True)
    found = select(*folders, tmp_path / "out", Tolerance("min_score", 0.95), files=files, **ONE)
    assert found.met
    assert found.report["score_fine_tuned"] == 1
    assert 0.95 <= found.report["score_artifact"] <= 1  # type: ignore[operator]
    assert found.report["score_base"] < 0.9  # type: ignore[operator]
    merged = AutoModelForCausalLM.from_pretrained(merge(folders[0], tmp_path / "out", tmp_path / "merged").folder)
    samples = read_texts(files, open_checkpoint(folders[0]), open_fine_tune(folders[1], open_checkpoint(folders[0])))
    right = 0
    for sample in samples["held-out"]:
        ids = torch.tensor([sample.ids[: sample.start]])
        given = merged.generate(ids, max_new_tokens=len(sample.ids) - sample.start, do_sample=False, eos_token_id=None)
        right += tuple(given[0].tolist()) == sample.ids
    assert found.report["score_artifact"] == right / len(samples["held-out"])


def test_continued_pretraining_is_warned_of(base: Path, text: Path, tmp_path: Path) -> None:
    torch.manual_seed(8)
    far = moved(tmp_path / "far", lambda p: 0.1 * torch.randn(p.shape))
    near = moved(tmp_path / "near", lambda p: 1e-4 * torch.randn(p.shape))
    checkpoint = open_checkpoint(base)
    sizes = [delta_size(open_fine_tune(folder, checkpoint), ()) for folder in (far, near)]
    assert [size.is_pretraining for size in sizes] == [True, False]
    assert sizes[1].mean == pytest.approx(1e-4 * (2 / torch.pi) ** 0.5, rel=0.05)
    assert sizes[1].share == pytest.approx(1e-3, rel=0.05)
    found = run(base, far, tmp_path / "out", text, Tolerance("max_kl", 1.0, relative=True), method="dense")
    assert any("looks like continued pretraining" in warning for warning in found.receipt.warnings)


def test_an_adapter_keeps_its_factors_where_all_is_wanted(base: Path, text: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "adapter")
    exact = run(base, tmp_path / "adapter", tmp_path / "out", text, Tolerance("max_kl", 1e-8))
    assert exact.receipt.method == "lora"
    smaller = run(base, tmp_path / "adapter", tmp_path / "out", text, Tolerance("max_kl", 0.2, relative=True))
    assert smaller.met
    assert smaller.receipt.size_bytes < exact.receipt.size_bytes


def test_no_text_is_said_to_be_pythons(base: Path, fine: Path, tmp_path: Path) -> None:
    found = select(base, fine, tmp_path / "out", Tolerance("max_kl", 9.0), method="dense")
    assert any("those on Python's documentation" in warning for warning in found.receipt.warnings)
