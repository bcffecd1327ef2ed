"""``deltaserve compress``: its options are those of the methods, and reach them."""

import json
import re

import pytest
from tiny_models import fine_tuned, save, tiny_llama

from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.pruning.methods import METHODS


@pytest.fixture
def checkpoints(tmp_path):
    return save(tiny_llama(), tmp_path / "base", vocab=64), save(fine_tuned(tiny_llama()), tmp_path / "fine", vocab=64)


def test_help_names_every_method_and_option(deltaserve):
    code, out, _ = deltaserve("compress", "--help")
    assert code == 0
    for name, method in METHODS.items():
        assert name in out
        assert all(f"--{option.replace('_', '-')}" in out for option in method.defaults)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("structural", {"unit": "columns", "drop": 0.5, "seed": 7}),
        ("low-rank-residual", {"linear_rank": 2, "drop": 0.6, "block": 4, "codec": "int4", "rank": 1}),
        ("darex", {"judge": "output", "per": "layer", "drop": 0.5}),
    ],
)
def test_options_reach_the_method(deltaserve, checkpoints, tmp_path, method, options):
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    code, out, _ = deltaserve("compress", *checkpoints, "-o", tmp_path / "out", "--method", method, *flags, "--json")
    assert code == 0
    made = open_artifact(tmp_path / "out").manifest.provenance
    assert made["options"] == {**METHODS[method].defaults, **options}
    assert (json.loads(out)["q"] is not None) == (method == "darex")


def test_the_q_that_was_found_is_said(deltaserve, checkpoints, tmp_path):
    code, out, _ = deltaserve("compress", *checkpoints, "-o", tmp_path / "out", "--method", "darex", "--drop", 0.5)
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("q ")]
    assert 0.4 < float(line.split()[1]) <= 1


def test_an_option_that_a_method_does_not_take_is_refused_by_name(deltaserve, checkpoints, tmp_path):
    code, out, err = deltaserve(
        "compress", *checkpoints, "-o", tmp_path / "out", "--method", "dense", "--judge", "labels"
    )
    assert (code, out) == (1, "")
    assert "The method dense has no option judge; it takes: codec, rank" in err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def text(tmp_path):
    lines = [{"prompt": f"say {word}", "answer": f"{word} it is"} for word in ("one", "two", "three", "four", "five")]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines * 5))
    return tmp_path / "text.jsonl"


NARROW = ("--method", "weighted", "--codec", "int4", "--block", "16", "--rank", "32")


def test_a_tolerance_starts_a_search_whose_path_is_told(deltaserve, checkpoints, text, tmp_path):
    out = tmp_path / "out"
    code, said, err = deltaserve("compress", *checkpoints, "-o", out, "--max-kl", "30%", "--calibration", text, *NARROW)
    assert (code, "Warning: No calibration" in err) == (0, False)
    for start in ("Delta: mean |delta|", "Survey, expected: random drop", "Contest: weighted", "Held-out text: KL"):
        assert any(line.startswith(start) for line in said.splitlines()), start
    lines = {line.split()[0]: line for line in said.splitlines() if line}
    assert lines["chosen"].split()[1] == "weighted"
    assert lines["plain"].startswith("plain DARE  KL ")
    assert lines["plot"].split()[1] == str(tmp_path / "out.search.png")
    assert open_artifact(out).manifest.quality["tolerance"]["met"] is True


def test_as_json_it_is_receipt_report_and_search(deltaserve, checkpoints, text, tmp_path):
    arguments = ("compress", *checkpoints, "-o", tmp_path / "out", "--calibration", text, *NARROW, "--json")
    code, said, _ = deltaserve(*arguments, "--min-agreement", 0.7, "--plot", tmp_path / "p.svg")
    assert code == 0
    found = json.loads(said)
    assert found["quality"] == open_artifact(tmp_path / "out").manifest.quality
    assert found["quality"]["top1_agreement"] >= 0.7
    assert found["size_bytes"] == (tmp_path / "out").stat().st_size
    assert found["selection"]["met"] is True
    assert found["selection"]["plot"] == str(tmp_path / "p.svg")
    assert found["selection"]["resumed"] == 0
    code, said, _ = deltaserve(*arguments, "--bytes", 14_000)
    again = json.loads(said)
    assert code == 0
    assert again["size_bytes"] <= 14_000
    assert again["selection"]["resumed"] == found["selection"]["tried"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-kl", "small"), "--max-kl is 'small'; give nats (0.004), or a share of the base's KL (2%)"),
        (("--max-kl", "1", "--bytes", 10_000), "A search has one tolerance, not --max-kl and --bytes"),
        (("--min-score", 0.5), "A score needs a task"),
        (("--task", "t.jsonl"), "--task is for a search; add a tolerance"),
        (("--force",), "--force is for a search"),
        (("--plot", "p.png"), "--plot is for a search"),
        (("--max-kl", "1", "--task", "t.jsonl", "--calibration", "c"), "leave --calibration out"),
        (("--max-kl", "1", "--evaluate", "t.txt"), "none to search on"),
        (("--min-score", 0.5, "--task", "t.txt"), "t.txt is no .jsonl file"),
        (("--max-kl", "1", "--method", "darex", "--judge", "labels"), "judge has no meaning"),
        (("--max-kl", "1", "--no-measure"), "A search measures"),
        (("--evaluate", "t.txt", "--no-measure"), "nothing is measured on t.txt; leave one of the two out"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(deltaserve, checkpoints, tmp_path, options, message):
    code, out, err = deltaserve("compress", *checkpoints, "-o", tmp_path / "out", *options)
    assert (code, out) == (1, "")
    assert message in err
    assert not list(tmp_path.glob("out*"))


def test_memory_is_how_quality_is_measured_and_nothing_else(deltaserve, checkpoints, text, tmp_path):
    """By layers the same figures, and the report says so; without anything to measure it is refused."""
    flags = ("compress", *checkpoints, "-o", tmp_path / "out", "--method", "dare", "--drop", 0.5)
    code, _, err = deltaserve(*flags, "--memory", "layers", "--no-measure")
    assert code == 1
    assert "The method dare runs no model but to measure; leave memory out, or have it measure" in err
    said = {}
    for memory in ("whole", "layers", "auto"):
        code, out, _ = deltaserve(*flags, "--evaluate", text, "--memory", memory)
        assert code == 0
        said[memory] = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert said["whole"]["KL"] == said["layers"]["KL"]
    assert [said[memory]["memory"] for memory in ("whole", "layers")] == ["whole, as asked", "layers, as asked"]
    assert re.match("whole: .* in float32 is at most half of the .* that are free", said["auto"]["memory"])


def test_a_search_measures_by_layers(deltaserve, checkpoints, text, tmp_path):
    options = ("--max-kl", "50%", "--calibration", text, "--method", "dare", "--memory", "layers", "--json")
    code, out, _ = deltaserve("compress", *checkpoints, "-o", tmp_path / "out", *options)
    assert code == 0
    assert json.loads(out)["memory"] == "layers, as asked"
