"""Real artifacts on disk: which fit, which load, and what the engine says of those that do not."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_variants import SMALL, Variant, alone, collect, greedy, random_variant
from tiny_models import save, tiny_llama

from deltaserve.delta_store.codec.artifact import open_artifact, write_artifact
from deltaserve.delta_store.codec.specs import DenseSpec
from deltaserve.delta_store.errors import BaseMismatch, CorruptArtifact, UnsupportedArtifact
from deltaserve.kernels.parts import Dense
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.requests import Sampling, Version
from deltaserve.server.engine.variant_engine import Fit

PROMPT = [5, 9, 33, 2]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(save(tiny_llama(), tmp_path / "base", vocab=64), limits=SMALL)
    engine.start()
    yield engine
    engine.stop()


def artifact(path: Path, base: str, variant: Variant, files: dict[str, bytes] | None = None) -> Version:
    """The variant's dense deltas as a file."""
    parts = []
    for name, delta in variant.deltas.items():
        (part,) = delta.parts
        assert isinstance(part, Dense)
        parts.append((name, DenseSpec(shape=part.shape, codec="float32", group=1), part))
    return Version(
        "v", write_artifact(path, base=base, tied_head=variant.tied_head, parts=parts, files=files), str(path)
    )


def test_an_artifact_on_disk_answers_like_its_merged_model(engine: Engine, tmp_path: Path) -> None:
    variant = random_variant(tiny_llama(), "dense", seed=1)
    version = artifact(tmp_path / "v.safetensors", engine.fingerprint, variant)
    assert engine.check_fits(open_artifact(version.path)) == Fit(len(variant.deltas), len(variant.deltas))
    assert asyncio.run(collect(engine, PROMPT, version, greedy(20))) == alone(variant.merged, PROMPT, 20)


def test_a_variant_brings_its_own_end_of_sequence(engine: Engine, tmp_path: Path) -> None:
    variant = random_variant(tiny_llama(), "dense", seed=1)
    free = alone(variant.merged, PROMPT, 20)
    files = {"generation_config.json": b'{"eos_token_id": [%d]}' % free[5]}
    version = artifact(tmp_path / "v.safetensors", engine.fingerprint, variant, files)
    answer = asyncio.run(collect(engine, PROMPT, version, Sampling(max_tokens=20, temperature=0)))
    assert answer == free[: free.index(free[5])]


def test_an_artifact_of_another_base_is_refused(engine: Engine, tmp_path: Path) -> None:
    version = artifact(tmp_path / "v.safetensors", "0" * 64, random_variant(tiny_llama(), "dense", seed=1))
    with pytest.raises(BaseMismatch, match="000000000000"):
        engine.check_fits(open_artifact(version.path))
    with pytest.raises(BaseMismatch):
        asyncio.run(collect(engine, PROMPT, version, greedy(3)))


def test_an_artifact_that_changes_nothing_or_names_no_layer_is_refused(engine: Engine, tmp_path: Path) -> None:
    variant = random_variant(tiny_llama(), "dense", seed=1)
    empty = artifact(tmp_path / "e", engine.fingerprint, Variant({}, True, variant.merged))
    with pytest.raises(UnsupportedArtifact, match="changes nothing"):
        engine.check_fits(open_artifact(empty.path))
    stray = Variant({"model.other.weight": next(iter(variant.deltas.values()))}, True, variant.merged)
    with pytest.raises(UnsupportedArtifact, match=r"model\.other\.weight"):
        engine.check_fits(open_artifact(artifact(tmp_path / "s", engine.fingerprint, stray).path))


def test_b_cut_short_or_missing_or_exchanged_fails_before_the_first_token(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    version = artifact(path, engine.fingerprint, random_variant(tiny_llama(), "dense", seed=1))
    whole = path.read_bytes()
    exchanged = bytes([*whole[:-1], whole[-1] ^ 1])
    for content in (whole[: len(whole) // 2], whole + b"more", exchanged, b""):
        path.write_bytes(content)
        with pytest.raises(CorruptArtifact, match=r"v\.safetensors"):
            asyncio.run(collect(engine, PROMPT, version, greedy(3)))
    path.unlink()
    with pytest.raises(CorruptArtifact, match=r"variant 'v' is not at .*v\.safetensors"):
        asyncio.run(collect(engine, PROMPT, version, greedy(3)))
    assert asyncio.run(collect(engine, PROMPT, None, greedy(20))) == alone(tiny_llama(), PROMPT, 20)
