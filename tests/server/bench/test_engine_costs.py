import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from running_server import artifact
from tiny_models import save, tiny_llama
from typer.testing import CliRunner

from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.errors import DeltaServeError, OptionError
from deltaserve.server.bench import engine_costs
from deltaserve.server.bench.client import Outcome, Record
from deltaserve.server.bench.cost_table import BASE, BESIDE, DISTINCT, MERGED, ROTATION, SWAPPED, UNSWAPPED, Case, Costs
from deltaserve.server.bench.engine_costs import Plan, measure
from deltaserve.server.bench.engine_load import Load
from deltaserve.server.bench.invented import invent
from deltaserve.server.cli import app
from deltaserve.server.engine.requests import Version
from deltaserve.server.engine.wrapped import VersionDeltas


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(), tmp_path_factory.mktemp("base"), vocab=64)


def plan(base: Path, *variants: Path) -> Plan:
    return Plan(str(base), variants, None, concurrency=2, repeats=3, max_tokens=3, seed=0, minutes=0)


def test_every_case_is_measured_beside_the_base_and_the_merged_model(base: Path, tmp_path: Path) -> None:
    options = ["--concurrency", "2", "--repeats", "2", "--max-tokens", "3", "--save", str(tmp_path / "costs.json")]
    variants = [str(artifact(base, tmp_path / f"{seed}.safetensors", seed=seed)) for seed in range(2)]
    result = CliRunner().invoke(app, ["bench", "--engine", str(base), "--variants", ",".join(variants), *options])
    assert result.exit_code == 0, result.output
    costs = json.loads((tmp_path / "costs.json").read_text())
    alone = {BASE, BESIDE, SWAPPED, UNSWAPPED, MERGED, ROTATION}
    found = {(case["what"], case["concurrency"]) for case in costs["cases"]}
    assert found == {(what, 1) for what in alone} | {(what, 2) for what in alone | {DISTINCT}}
    for case in costs["cases"]:
        assert case["repeats"] == 2
        assert case["tokens_per_s"]["p20"] <= case["tokens_per_s"]["median"] <= case["tokens_per_s"]["p80"]
        assert (case["over_base_alone"]["median"] == 1.0) == (case["what"] == BASE)
    assert all(costs[name]["median"] > 0 for name in ("reload_ms", "swap_ms"))
    assert [goal["limit"] for goal in costs["goals"]] == [0.98, 0.98, 0.98, 0.98, 0.90]
    assert "A merged checkpoint from file to first token" in result.output


def test_variant_is_made_up_where_none_is_given(base: Path, tmp_path: Path) -> None:
    invent(str(base), tmp_path / "invented.safetensors")
    made = open_artifact(tmp_path / "invented.safetensors")
    assert len(made.names) == len(list(tiny_llama().state_dict())) - 1, "every parameter, and the tied head is none"
    costs = measure(plan(base))
    assert costs.setup["variants"] == "made up"
    assert len(costs.cases) == 13
    assert {len(repeats) for repeats in costs.cases.values()} == {1}, "no second repeat begins after no minutes"


def test_wrong_answers_are_not_timed(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged checkpoint is the base: as if the engine had not applied the variant."""
    names = [name for name in tiny_llama().state_dict() if name.endswith("proj.weight")]
    wrong = artifact(base, tmp_path / "variant.safetensors", names)
    monkeypatch.setattr(engine_costs, "merge", lambda base, artifact, out, *rest: save(tiny_llama(), out, vocab=64))
    with pytest.raises(DeltaServeError, match="differ from its merged model's"):
        measure(plan(base, wrong))


def test_only_rotation_loads_variants_while_it_is_measured(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More variants rotate than fit, so that any case after it would begin with loads of its own."""
    loaded: list[str] = []
    during: dict[bool, list[str]] = {True: [], False: []}
    loader, drive = engine_costs._loader, engine_costs.drive

    def watched(*args: Any) -> Callable[[Version], VersionDeltas]:
        load = loader(*args)
        return lambda version: loaded.append(version.variant) or load(version)  # type: ignore[func-returns-value]

    async def measured(load: Load, *args: int) -> list[Record]:
        asked = {load.version(number) for number in range(2 * load.clients)}
        loaded.clear()
        records = await drive(load, *args)
        during[len(asked) > load.clients] += loaded
        return records

    monkeypatch.setattr(engine_costs, "_loader", watched)
    monkeypatch.setattr(engine_costs, "drive", measured)
    measure(replace(plan(base), minutes=5))
    assert during[False] == []
    assert during[True]


def test_missing_artifact_is_named(base: Path) -> None:
    with pytest.raises(OptionError, match=r"no artifact absent\.safetensors"):
        measure(plan(base, Path("absent.safetensors")))


def records(tokens_per_s: float) -> Iterator[Record]:
    yield Record("m", Outcome.COMPLETED, 0.0, 10.0, (1.0, 10.0), round(10 * tokens_per_s))


def test_ratios_are_within_a_repeat() -> None:
    """The machine got twice as slow; the variant costs a tenth in both repeats all the same."""
    costs = Costs({"repeats": 2})
    for speed in (100.0, 50.0):
        costs.add(Case(BASE, 1), list(records(speed)))
        costs.add(Case(BESIDE, 1), list(records(0.9 * speed)))
    ratio = costs.ratio(Case(BESIDE, 1), BASE)
    assert (ratio.median, ratio.p20, ratio.p80) == pytest.approx((0.9, 0.9, 0.9))
