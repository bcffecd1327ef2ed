"""``deltaserve compress``: its options are those of the methods, and reach them."""

import json
import sys

import pytest
from tiny_models import fine_tuned, save, tiny_llama

from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.pruning.methods import METHODS
from deltaserve.server.cli import main


@pytest.fixture
def deltaserve(monkeypatch, capfd, tmp_path):
    """Run a command; returns its exit status, stdout and stderr."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deltaserve", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


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
