"""Artifacts that are damaged, or made by somebody hostile: refused with a reason, and nothing large is allocated."""

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
from safetensors import safe_open
from safetensors.numpy import save_file
from sample_artifacts import read_all, write

from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.errors import ArtifactError, CorruptArtifact, UnsupportedArtifact


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "variant.safetensors"
    write(path)
    return path


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
