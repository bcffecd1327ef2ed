"""The artifact file: the same bytes everywhere, whole or refused, and cheap in what it adds to its parts."""

import hashlib
import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from deltaserve.delta_store.codec import encode
from deltaserve.delta_store.codec.artifact import Artifact, open_artifact, write_artifact
from deltaserve.delta_store.codec.specs import DenseSpec, LowRankSpec, RowsSpec, SparseSpec, Spec
from deltaserve.delta_store.codec.xor import xor
from deltaserve.delta_store.errors import ArtifactError, CorruptArtifact, ProfileMissing, UnsupportedArtifact
from deltaserve.kernels.parts import Codes, Delta, Dense
from deltaserve.kernels.reference import unpack

BASE = "b" * 64
CODED = {"int8": 64, "int4": 64, "int2": 128, "sign": 64}


class Weights:
    """A profile in which column ``j`` of every parameter has weight ``16 + j``."""

    digest = "d" * 64

    def __contains__(self, name: str) -> bool:
        return True

    def weights(self, name: str) -> Tensor:
        return torch.arange(16, 16 + 63)


def values(*shape: int, start: int = 0) -> Tensor:
    """Numbers that are the same everywhere: multiples of 1/64 from -50/64 to 50/64."""
    count = int(np.prod(shape))
    return ((torch.arange(start, start + count) * 37 % 101 - 50) / 64).reshape(shape)


def all_parts() -> list[tuple[str, Spec, Any]]:
    """Every mask, codec and kind once."""
    parts: list[tuple[str, Spec, Any]] = []
    for codec, group in {**CODED, "bf16": 1, "float32": 1}.items():
        fields: dict[str, Any] = {"shape": (21, 63), "kept": 7, "block": 8, "codec": codec, "group": group}
        uniform = SparseSpec(mask="uniform", seed=1, divisor=7 / 63, **fields)
        weighted = SparseSpec(mask="weighted", seed=2, divisor=1.0, **fields)
        explicit = SparseSpec(mask="explicit", seed=None, divisor=0.5, **fields)
        name = f"layers.{codec}.weight"
        columns = torch.arange(7).repeat(3, 1) * torch.tensor([[1], [2], [10]])
        parts += [
            (name, uniform, encode.seeded_sparse(values(21, 63), uniform, name)),
            (name, weighted, encode.seeded_sparse(values(21, 63, start=5), weighted, name, Weights())),
            (name, explicit, encode.explicit_sparse(values(21, 63, start=9), explicit, columns)),
        ]
        dense = DenseSpec(shape=(63,), codec=codec, group=group)
        parts.append((f"layers.{codec}.bias", dense, encode.dense(values(63), dense)))
    low_rank = LowRankSpec(shape=(21, 63), rank=2, codec="int8", group=16)
    rows = RowsSpec(shape=(21, 63), base_rows=20, count=2, codec="bf16", has_mean=True)
    xor_spec, payload = xor(values(20, 6), values(21, 6, start=3))
    return [
        *parts,
        ("embedding", low_rank, encode.low_rank(values(2, 63), values(21, 2), low_rank)),
        ("embedding", rows, encode.rows(values(2, 63), torch.tensor([4, 20]), values(63), rows)),
        ("exact", xor_spec, payload),
    ]


def write(path: Path, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "base": BASE,
        "tied_head": True,
        "parts": all_parts(),
        "profile": Weights.digest,
        "provenance": {"method": "weighted", "density": 0.05},
        "quality": {"mean_kl": 0.0125},
        "files": {"tokenizer.json": b'{"version": "1.0"}', "chat_template.jinja": "{{ 'é' }}".encode()},
    }
    return write_artifact(path, **arguments | changes)


def rewrite(path: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """The file at ``path`` with its manifest and tensors changed by ``edit``: what a hostile writer could make."""
    with safe_open(path, "numpy") as file:
        manifest, tensors = (
            json.loads(file.metadata()["deltaserve"]),
            {key: file.get_tensor(key) for key in list(file.keys())},
        )
    edit(manifest, tensors)
    changed = path.with_name("changed.safetensors")
    save_file(tensors, changed, {"deltaserve": json.dumps(manifest)})
    return changed


def read_all(artifact: Artifact) -> dict[str, Tensor]:
    base = {"exact": values(20, 6)}
    return {name: unpack(artifact.delta(name, Weights(), base.get(name))) for name in artifact.names}


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


@pytest.mark.parametrize(
    ("damage", "without_digest"),
    [
        pytest.param(lambda data: data[:-100], True, id="without-its-last-100-bytes"),
        pytest.param(lambda data: data + bytes(16), True, id="with-16-extra-bytes"),
        pytest.param(lambda data: data[:-50] + bytes([data[-50] ^ 4]) + data[-49:], False, id="with-a-flipped-bit"),
    ],
)
def test_b_cut_short(path: Path, damage: Callable[[bytes], bytes], without_digest: bool) -> None:
    digest = open_artifact(path).digest
    good = path.read_bytes()
    path.write_bytes(damage(good))
    with pytest.raises(CorruptArtifact, match=f"{path.name} is damaged"):
        open_artifact(path, verify=digest)
    if without_digest:
        with pytest.raises(CorruptArtifact, match=f"{path.name} is damaged, cut short"):
            open_artifact(path)
    path.write_bytes(good)
    assert len(read_all(open_artifact(path, verify=digest))) == 14


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


def test_a_file_without_our_metadata_is_told_apart(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(4, np.float32)}, tmp_path / "plain.safetensors")
    with pytest.raises(CorruptArtifact, match=r"plain\.safetensors is no artifact: .*without 'deltaserve' metadata"):
        open_artifact(tmp_path / "plain.safetensors")
    (tmp_path / "text").write_text("hello, this is no tensor")
    with pytest.raises(CorruptArtifact, match="text is no artifact"):
        open_artifact(tmp_path / "text")
    with pytest.raises(ArtifactError, match="missing cannot be read"):
        open_artifact(tmp_path / "missing")


def set_field(field: str, value: Any, part: int | None = None) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def edit(manifest: dict[str, Any], tensors: dict[str, Any]) -> None:
        (manifest if part is None else manifest["parts"][part])[field] = value

    return edit


def add_tensor(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda manifest, tensors: tensors.update({key: value})


BYTES = np.zeros(100, np.uint8)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (set_field("format_version", 2), UnsupportedArtifact, "format version 2.*upgrade"),
        (set_field("later", 1), UnsupportedArtifact, "later"),
        (set_field("kind", "fourier", 0), UnsupportedArtifact, "fourier"),
        (set_field("codec", "int3", 0), UnsupportedArtifact, "codec"),
        (set_field("mask", "learned", 0), UnsupportedArtifact, "mask"),
        (set_field("later", 1, 0), UnsupportedArtifact, "later"),
        (set_field("format_version", 0), CorruptArtifact, "format_version"),
        (set_field("format_version", True), CorruptArtifact, "format_version"),
        (set_field("base", "../" * 21 + "a"), CorruptArtifact, "base"),
        (set_field("profile", None), CorruptArtifact, "profile"),
        (set_field("parts", []), CorruptArtifact, "index below 0"),
        (set_field("shape", [-21, 63], 0), CorruptArtifact, "shape"),
        (set_field("shape", [21], 0), CorruptArtifact, "shape"),
        (set_field("shape", [1 << 20, 1 << 20], 0), CorruptArtifact, "specification asks for"),
        (set_field("shape", [1 << 40, 63], 0), CorruptArtifact, "shape"),
        (set_field("kept", 8, 0), CorruptArtifact, "specification asks for"),
        (set_field("kept", 64, 0), CorruptArtifact, "64 columns cannot be kept of 63"),
        (set_field("group", 128, 0), CorruptArtifact, "specification asks for"),
        (set_field("shape", [63, 21], 0), CorruptArtifact, "."),
        (set_field("divisor", 1e-300, 0), CorruptArtifact, "divisor"),
        (set_field("transposed", True, 0), CorruptArtifact, "differ in shape"),
        (set_field("provenance", {"text": "x" * (1 << 20)}), CorruptArtifact, "limit is 1048576"),
        (add_tensor("w:99", BYTES), CorruptArtifact, "w:99"),
        (add_tensor("w:-1", BYTES), CorruptArtifact, "w:-1"),
        (add_tensor("w:00", BYTES), CorruptArtifact, "w:00"),
        (add_tensor(":0", BYTES), CorruptArtifact, "':0'"),
        (add_tensor("w", BYTES), CorruptArtifact, "'w'"),
        (add_tensor("w:0", BYTES.view(np.float32)), CorruptArtifact, "F32"),
        (add_tensor("w:0", BYTES.reshape(10, 10)), CorruptArtifact, "not a run of bytes"),
        (add_tensor("file:../../etc/passwd", BYTES), CorruptArtifact, "passwd"),
        (add_tensor("file:.bashrc", BYTES), CorruptArtifact, "bashrc"),
        (add_tensor("file:", BYTES), CorruptArtifact, "plain name"),
    ],
)
def test_hostile_contents_are_refused(
    path: Path, edit: Callable[..., None], error: type[ArtifactError], message: str
) -> None:
    changed = rewrite(path, edit)
    with pytest.raises(error, match=message) as caught:
        open_artifact(changed)
    assert str(changed) in str(caught.value)
    assert type(caught.value) is error


def test_a_deeply_nested_manifest_is_refused(path: Path) -> None:
    with safe_open(path, "numpy") as file:
        tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    text = '{"format_version":1,"provenance":' + "[" * 100_000
    save_file(tensors, path, {"deltaserve": text})
    with pytest.raises(CorruptArtifact, match="manifest is not valid"):
        open_artifact(path)


def test_a_lossless_delta_stands_alone(path: Path) -> None:
    index = [part["kind"] for part in open_artifact(path).manifest.model_dump()["parts"]].index("xor")

    def edit(manifest: dict[str, Any], tensors: dict[str, Any]) -> None:
        manifest["parts"].append(
            {"kind": "dense", "shape": [21, 6], "transposed": False, "codec": "sign", "group": 126}
        )
        tensors[f"exact:{len(manifest['parts']) - 1}"] = np.zeros(18, np.uint8)
        assert f"exact:{index}" in tensors

    with pytest.raises(CorruptArtifact, match="exact has further parts"):
        open_artifact(rewrite(path, edit))


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


FUZZ_ROUNDS = 400
SPARE_BYTES = 32 << 20


@contextmanager
def spare_memory(spare_bytes: int) -> Iterator[None]:
    """Inside, the process cannot map more than ``spare_bytes`` beyond what it has: a huge allocation is an error."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def damaged(data: bytes, random: Random) -> bytes:
    """One to three bytes changed, half of the time in the header; sometimes cut, or with a length that lies."""
    changed = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(random.randint(1, 3)):
        at = random.randrange(header if random.random() < 0.5 else len(data))
        changed[at] = random.choice([random.randrange(256), changed[at] ^ 1 << random.randrange(8), ord("9")])
    return bytes(changed[: random.randrange(len(data))] if random.random() < 0.1 else changed)


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own memory by /proc")
def test_a_damaged_file_is_refused_or_read_but_never_crashes(path: Path) -> None:
    good, random, refused = path.read_bytes(), Random(0), 0
    read_all(open_artifact(path))
    with spare_memory(SPARE_BYTES):
        for _ in range(FUZZ_ROUNDS):
            path.write_bytes(damaged(good, random))
            try:
                read_all(open_artifact(path))
            except ArtifactError:
                refused += 1
    assert FUZZ_ROUNDS / 2 < refused < FUZZ_ROUNDS


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own memory by /proc")
def test_a_manifest_that_lies_about_sizes_allocates_nothing(path: Path) -> None:
    """Every number of every specification, replaced by ones that are too large, too small, or of another type."""
    specs = open_artifact(path).manifest.model_dump(mode="json")["parts"]
    fields = [(index, field) for index, spec in enumerate(specs) for field in spec if field != "kind"]
    lies = [-1, 0, 1, 1 << 20, 1 << 63, 0.5, None, True, [1 << 20] * 2, [1, 1 << 20]]
    refused = 0
    with spare_memory(SPARE_BYTES):
        for index, field in fields:
            for lie in lies:
                try:
                    read_all(open_artifact(rewrite(path, set_field(field, lie, index))))
                except ArtifactError:
                    refused += 1
    assert len(fields) * len(lies) * 0.8 < refused < len(fields) * len(lies)
