"""What ``inspect`` says, and the three commands as a user runs them."""

import json
from pathlib import Path

import pytest
import typer
from tiny_models import fine_tuned, save, tiny_llama
from typer.testing import CliRunner

from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.errors import CorruptArtifact, OptionError
from deltaserve.delta_store.inspect import inspect
from deltaserve.server.commands import compress as compress_command
from deltaserve.server.commands import inspect as inspect_command
from deltaserve.server.commands import merge as merge_command

runner = CliRunner()
app = typer.Typer()
for module in (compress_command, inspect_command, merge_command):
    app.command(module.__name__.rpartition(".")[2])(module.command)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tiny_llama(), tmp_path_factory.mktemp("base"), vocab=64))


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(fine_tuned(tiny_llama()), tmp_path_factory.mktemp("fine"), vocab=64))


def test_every_byte_is_accounted_for(base: str, fine: str, tmp_path: Path) -> None:
    receipt = compress(base, fine, tmp_path / "out", method="dare", options={"drop": 0.5})
    found = inspect(tmp_path / "out")
    assert sum(row.size_bytes for row in found.rows) + sum(found.overhead_bytes.values()) == receipt.size_bytes
    kinds = {(row.kind, row.codec): row for row in found.rows}
    sparse = kinds["sparse (uniform)", "int4"]
    assert (sparse.tensors, sparse.weights) == (14, sum(p.numel() for n, p in linears()))
    assert sparse.bits_per_weight == pytest.approx(0.5 * (4 + 16 / 64), rel=0.01)
    assert kinds["dense", "bf16"].bits_per_weight == 16
    assert {("low_rank", "int8"), ("rows", "bf16")} < kinds.keys()


def linears() -> list[tuple[str, "object"]]:
    return [(name, p) for name, p in tiny_llama().named_parameters() if name.endswith("proj.weight")]


def test_compress_prints_what_it_wrote(base: str, fine: str, tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("the quick brown fox. " * 30)
    result = runner.invoke(app, ["compress", base, fine, "-o", str(out), "--drop", "0.5", "--evaluate", str(text)])
    assert result.exit_code == 0, result.output
    for words in ("weighted", "20 of 20", f"{out.stat().st_size:,} bytes", "of the 16-bit checkpoint", "KL", "loss"):
        assert words in result.stdout
    assert "Compress" in result.stderr


def test_compress_passes_every_option_on(base: str, fine: str, tmp_path: Path) -> None:
    options = ["--method", "dare", "--drop", "0.25", "--block", "4", "--codec", "sign", "--seed", "9", "--rank", "2"]
    options += ["--embedding-codec", "int4", "--whole-codec", "int8"]
    result = runner.invoke(app, ["compress", base, fine, "-o", str(tmp_path / "out"), "--json", *options])
    receipt = json.loads(result.stdout)
    assert receipt["ratio"] == pytest.approx(receipt["full_bytes"] / receipt["size_bytes"], abs=0.01)
    found = inspect(tmp_path / "out")
    kept = {"rank": 2, "embedding_codec": "int4", "whole_codec": "int8"}
    assert found.provenance["options"] == {"drop": 0.25, "block": 4, "codec": "sign", "seed": 9, **kept}
    assert found.digest == receipt["digest"]


def test_a_profile_is_made_from_the_text_and_kept_where_asked(base: str, fine: str, tmp_path: Path) -> None:
    text, profile = tmp_path / "text.txt", tmp_path / "profile.safetensors"
    text.write_text("the quick brown fox. " * 30)
    made = ["compress", base, fine, "-o", str(tmp_path / "one"), "--calibration", str(text), "--profile", str(profile)]
    taken = ["compress", base, fine, "-o", str(tmp_path / "two"), "--profile", str(profile)]
    assert [runner.invoke(app, command).exit_code for command in (made, taken)] == [0, 0]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_unchanged_fine_tune_is_warned_about(base: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["compress", base, base, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "Warning:" in result.stderr
    assert "equals the base" in result.stderr


def test_inspect_shows_table_and_json(base: str, fine: str, tmp_path: Path) -> None:
    receipt = compress(base, fine, tmp_path / "out")
    shown = runner.invoke(app, ["inspect", str(tmp_path / "out")]).stdout
    for words in (receipt.digest, receipt.profile or "", "sparse (weighted)", "int2", "made by: method"):
        assert words in shown
    data = json.loads(runner.invoke(app, ["inspect", str(tmp_path / "out"), "--json"]).stdout)
    assert data["digest"] == receipt.digest
    assert data["rows"][0]["bits_per_weight"] > 0


def test_merge_writes_a_folder(base: str, fine: str, tmp_path: Path) -> None:
    compress(base, fine, tmp_path / "out", method="lossless")
    result = runner.invoke(app, ["merge", base, str(tmp_path / "out"), "-o", str(tmp_path / "merged")])
    assert result.stdout.startswith(f"{tmp_path / 'merged'}: 20 tensors")
    assert (tmp_path / "merged" / "model.safetensors").exists()
    command = ["merge", base, str(tmp_path / "out"), "-o", str(tmp_path / "half"), "--dtype", "bfloat16", "--json"]
    data = json.loads(runner.invoke(app, command).stdout)
    assert (data["tensors"], data["shards"]) == (20, 1)


def test_users_mistakes_are_deltaserve_errors(base: str, fine: str, tmp_path: Path) -> None:
    """``cli.main`` makes one line of them."""
    out = str(tmp_path / "out")
    unknown = runner.invoke(app, ["compress", base, fine, "-o", out, "--method", "nonesuch"])
    assert isinstance(unknown.exception, OptionError)
    (tmp_path / "text").write_text("no artifact")
    damaged = runner.invoke(app, ["inspect", str(tmp_path / "text")])
    assert isinstance(damaged.exception, CorruptArtifact)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["compress", "inspect", "merge"])
def test_every_command_has_help_and_an_example(name: str) -> None:
    shown = runner.invoke(app, [name, "--help"]).stdout
    assert f"Example: `deltaserve {name}" in " ".join(shown.split()).replace("│", "")
