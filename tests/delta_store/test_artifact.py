"""The artifact file: the same bytes everywhere, whole or refused, and cheap in what it adds to its parts."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from sample_artifacts import BASE, CODED, Weights, all_parts, read_all, values, write

from deltaserve.delta_store.codec import encode
from deltaserve.delta_store.codec.artifact import open_artifact, write_artifact
from deltaserve.delta_store.codec.mapped import MappedTensors
from deltaserve.delta_store.codec.specs import DenseSpec, SparseSpec, Spec
from deltaserve.delta_store.errors import ArtifactError, CorruptArtifact, ProfileMissing, UnsupportedArtifact
from deltaserve.kernels.parts import Codes, Delta, Dense
from deltaserve.kernels.reference import unpack


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "variant.safetensors"
    write(path)
    return path


def test_a_small_artifact_has_the_same_bytes_everywhere(path: Path) -> None:
    """Changes only with the format version (or zstd's encoder, which constraints.txt pins)."""
    assert (
        hashlib.sha256(path.read_bytes()).hexdigest()
        == "c8bab6ce8ee1174a0dc1107013f4ada6f9b9bd76f6e0bf668a4aa337430d226c"
    )


def test_what_was_written_is_read(path: Path) -> None:
    artifact = open_artifact(path)
    assert artifact.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (artifact.manifest.base, artifact.manifest.tied_head, artifact.manifest.format_version) == (BASE, True, 1)
    assert artifact.manifest.provenance == {"method": "weighted", "density": 0.05}
    assert artifact.manifest.quality == {"mean_kl": 0.0125}
    assert artifact.files == {"tokenizer.json": b'{"version": "1.0"}', "chat_template.jinja": "{{ 'é' }}".encode()}
    decoded = read_all(artifact)
    expected: dict[str, list[Any]] = {}
    for name, _, part in all_parts():
        expected.setdefault(name, []).append(part)
    assert artifact.names == tuple(sorted(expected))
    assert decoded.pop("exact")[:20].equal(values(21, 6, start=3)[:20] - values(20, 6))
    for name, delta in decoded.items():
        assert delta.equal(unpack(Delta(expected[name][0].shape, tuple(expected[name])))), name


def test_the_lossless_part_gives_back_the_fine_tune(path: Path) -> None:
    artifact = open_artifact(path)
    assert artifact.restore("exact", values(20, 6)).equal(values(21, 6, start=3))
    with pytest.raises(UnsupportedArtifact, match="embedding is stored as low_rank"):
        artifact.restore("embedding", values(20, 63))


def test_totals_account_for_every_byte(path: Path) -> None:
    artifact = open_artifact(path)
    totals = artifact.totals()
    assert set(totals) == {"header", "sparse", "low_rank", "dense", "rows", "xor", "files"}
    assert sum(totals.values()) == path.stat().st_size
    assert totals["sparse"] == sum(
        sum(artifact.part_bytes(f"layers.{codec}.weight")) for codec in (*CODED, "bf16", "float32")
    )


def test_an_artifact_without_parts_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "nothing.safetensors"
    digest = write_artifact(path, base=BASE, tied_head=False, parts=[])
    assert open_artifact(path, verify=digest).names == ()


def test_header_and_manifest_stay_under_5_percent_of_a_small_artifact(tmp_path: Path) -> None:
    """The tensors of a model of 135 million parameters, at a third of its widths; its artifact has about 850 KB."""
    shapes = {
        "self_attn.q_proj": (192, 192),
        "self_attn.k_proj": (64, 192),
        "self_attn.v_proj": (64, 192),
        "self_attn.o_proj": (192, 192),
        "mlp.gate_proj": (512, 192),
        "mlp.up_proj": (512, 192),
        "mlp.down_proj": (192, 512),
    }

    def parts() -> Iterator[tuple[str, Spec, Any]]:
        for layer in range(30):
            for name, shape in shapes.items():
                parameter = f"model.layers.{layer}.{name}.weight"
                spec = SparseSpec(
                    shape=shape, mask="uniform", kept=6, block=16, codec="int4", group=64, seed=0, divisor=0.01
                )
                yield parameter, spec, encode.seeded_sparse(torch.zeros(shape), spec, parameter)
            for name in ("input_layernorm", "post_attention_layernorm"):
                norm = DenseSpec(shape=(192,), codec="bf16", group=1)
                yield f"model.layers.{layer}.{name}.weight", norm, encode.dense(torch.zeros(192), norm)

    write_artifact(tmp_path / "a", base=BASE, tied_head=True, parts=parts())
    artifact = open_artifact(tmp_path / "a")
    assert len(artifact.manifest.parts) == 5
    assert len(artifact.names) == 270
    assert artifact.totals()["header"] < 0.05 * 850_000


def test_b_shared_storage(tmp_path: Path) -> None:
    """Two names on one storage, a transposed view, and 4 rows of a buffer with 10,000: stored as what they show."""
    buffer = values(10_000, 8).bfloat16()
    shown = {"embedding": buffer[:32], "head": buffer[:32], "turned": buffer[:16].T, "sliced": buffer[5000:5004]}

    def parts() -> Iterator[tuple[str, Spec, Dense]]:
        for name, tensor in shown.items():
            shape = (tensor.shape[0], tensor.shape[1])
            empty = torch.empty(0, dtype=torch.bfloat16)
            codes = Codes("bf16", shape, tensor if name == "turned" else tensor.flatten(), empty, 1)
            yield name, DenseSpec(shape=shape, codec="bf16", group=1), Dense(shape, codes)

    path = tmp_path / "shared.safetensors"
    write_artifact(path, base=BASE, tied_head=False, parts=parts())
    artifact = open_artifact(path)
    for name, tensor in shown.items():
        assert unpack(artifact.delta(name)).equal(tensor.float()), name
    assert artifact.totals()["dense"] == sum(tensor.numel() * 2 for tensor in shown.values())
    assert artifact.totals()["dense"] + artifact.totals()["header"] == path.stat().st_size
    with safe_open(path, "numpy") as file:
        assert json.loads(file.metadata()["deltaserve"])["format_version"] == 1


def test_another_profile_is_refused(path: Path) -> None:
    artifact = open_artifact(path)
    other = Weights()
    other.digest = "e" * 64
    for profile in (None, other):
        with pytest.raises(ProfileMissing, match="d" * 64) as caught:
            artifact.delta("layers.int4.weight", profile)
        assert caught.value.digest == Weights.digest
    artifact.delta("layers.int4.bias", None)


def test_a_failure_leaves_nothing_behind(path: Path) -> None:
    before = path.read_bytes()

    def parts() -> Iterator[tuple[str, Spec, Any]]:
        yield all_parts()[0]
        raise RuntimeError("the second tensor cannot be read")

    with pytest.raises(RuntimeError):
        write(path, parts=parts())
    with pytest.raises(ArtifactError, match="two parts of one specification"):
        write(path, parts=all_parts()[:1] * 2)
    with pytest.raises(CorruptArtifact, match="plain name"):
        write(path, files={"../outside": b""})
    with pytest.raises(ArtifactError, match="cannot be written"):
        write(path.parent / "no" / "such" / "folder")
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_mapped_tensors_are_those_of_the_file_and_outlive_it(path: Path) -> None:
    with safe_open(path, "pt") as whole:
        expected = {key: whole.get_tensor(key) for key in whole.keys()}  # noqa: SIM118
    mapped = MappedTensors(path)
    path.unlink()
    assert len(expected) > 5
    assert all(torch.equal(mapped.get_tensor(key), tensor) for key, tensor in expected.items())
