"""The artifact file: one safetensors file that holds a fine-tune's delta (layout: ``docs/artifact.md``)."""

import hashlib
import re
import secrets
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from deltaserve.delta_store.blobs import sync
from deltaserve.delta_store.codec.columns import ColumnWeights
from deltaserve.delta_store.codec.manifest import Manifest, parse
from deltaserve.delta_store.codec.parts import Stored, check_length, decode, encode
from deltaserve.delta_store.codec.specs import SparseSpec, Spec, XorSpec
from deltaserve.delta_store.codec.xor import restore
from deltaserve.delta_store.errors import (
    ArtifactError,
    BaseMismatch,
    CorruptArtifact,
    ProfileMissing,
    UnsupportedArtifact,
)
from deltaserve.kernels.parts import Delta, Part

METADATA_KEY = "deltaserve"
FILE_PREFIX = "file:"
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
HEADER_LIMIT_BYTES = 8 << 20
"""About 70,000 parts."""


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """An open artifact; ``digest`` is the SHA-256 of its file in hex. Tensors are read when they are asked for."""

    path: Path
    digest: str
    manifest: Manifest
    keys: Mapping[str, tuple[int, ...]]
    """For each parameter with a delta, sorted: indices into ``manifest.parts``."""
    file_names: tuple[str, ...]
    header_bytes: int
    reader: Any

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters with a delta, sorted."""
        return tuple(self.keys)

    def specs(self, name: str) -> tuple[Spec, ...]:
        """The specifications of the parts of a parameter's delta."""
        return tuple(self.manifest.parts[index] for index in self.keys[name])

    def delta(self, name: str, profile: ColumnWeights | None = None, base: Tensor | None = None) -> Delta:
        """The delta of one parameter, ``[out, in]`` or ``[n]``.

        ``profile`` is needed where a mask is weighted, ``base`` (the base's tensor, so oriented) where it is lossless.
        Raises ProfileMissing, BaseMismatch, CorruptArtifact.
        """
        specs = self.specs(name)
        if any(isinstance(spec, SparseSpec) and spec.mask == "weighted" for spec in specs):
            self._check_profile(profile)
        try:
            parts = [self._part(name, index, profile, base) for index in self.keys[name]]
        except (CorruptArtifact, BaseMismatch) as error:
            raise type(error)(f"{self.path}: {name}: {error}") from error
        return Delta(specs[0].shape, tuple(parts))

    def restore(self, name: str, base: Tensor) -> Tensor:
        """The fine-tune's tensor of a lossless delta, bit for bit, in its own dtype. ``base`` as for ``delta``."""
        spec = self.specs(name)[0]
        if not isinstance(spec, XorSpec):
            raise UnsupportedArtifact(
                f"{self.path}: {name} is stored as {spec.kind}, from which no bits can be restored"
            )
        try:
            return restore(self._read(f"{name}:{self.keys[name][0]}").numpy().tobytes(), spec, base)
        except (CorruptArtifact, BaseMismatch) as error:
            raise type(error)(f"{self.path}: {name}: {error}") from error

    @property
    def files(self) -> dict[str, bytes]:
        """Files that the variant brings along (tokenizer, chat template, ...), read anew each time."""
        return {name: self._read(FILE_PREFIX + name).numpy().tobytes() for name in self.file_names}

    def totals(self) -> dict[str, int]:
        """Bytes by kind of part, of ``files`` and of the ``header``; together the size of the file."""
        totals: dict[str, int] = {"header": self.header_bytes}
        for name, indices in self.keys.items():
            for index in indices:
                kind = self.manifest.parts[index].kind
                totals[kind] = totals.get(kind, 0) + self._length(f"{name}:{index}")
        if self.file_names:
            totals["files"] = sum(self._length(FILE_PREFIX + name) for name in self.file_names)
        return totals

    def part_bytes(self, name: str) -> tuple[int, ...]:
        """Bytes of each part of a parameter's delta, in the order of ``specs``."""
        return tuple(self._length(f"{name}:{index}") for index in self.keys[name])

    def _part(self, name: str, index: int, profile: ColumnWeights | None, base: Tensor | None) -> Part:
        return decode(self._read(f"{name}:{index}"), self.manifest.parts[index], name, profile, base)

    def _read(self, key: str) -> Tensor:
        try:
            tensor: Tensor = self.reader.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CorruptArtifact(f"{self.path}: {key} cannot be read ({error})") from error
        return tensor

    def _length(self, key: str) -> int:
        return int(self.reader.get_slice(key).get_shape()[0])

    def _check_profile(self, profile: ColumnWeights | None) -> None:
        wanted = self.manifest.profile or ""
        if profile is None or profile.digest != wanted:
            given = "none was given" if profile is None else f"{profile.digest} was given"
            raise ProfileMissing(f"{self.path} needs the activation profile {wanted}, {given}", wanted)


def write_artifact(
    path: str | Path,
    *,
    base: str,
    tied_head: bool,
    parts: Iterable[tuple[str, Spec, Stored]],
    profile: str | None = None,
    provenance: dict[str, JsonValue] | None = None,
    quality: dict[str, JsonValue] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> str:
    """Write an artifact and return its digest. Same arguments, same bytes; the file comes whole or not at all.

    ``parts`` are (parameter name, specification, part), consumed one at a time. A parameter's delta is the sum of its
    parts, whose specifications must differ. Raises ArtifactError.
    """
    table: dict[Spec, int] = {}
    tensors = {FILE_PREFIX + name: content for name, content in (files or {}).items()}
    for name, spec, part in parts:
        key = f"{name}:{table.setdefault(spec, len(table))}"
        if key in tensors:
            raise ArtifactError(
                f"{name} has two parts of one specification ({spec}); join them, or draw with another seed"
            )
        tensors[key] = encode(part, spec)
    manifest = Manifest(
        base=base,
        tied_head=tied_head,
        profile=profile,
        parts=tuple(table),
        provenance=provenance or {},
        quality=quality,
    )
    return _write(Path(path), tensors, manifest.to_json())


def open_artifact(path: str | Path, *, verify: str | None = None) -> Artifact:
    """Open an artifact after checking everything but the values of its numbers; ``verify`` is the digest it must have.

    Raises CorruptArtifact (damaged, or not an artifact), UnsupportedArtifact (made by a later version), ArtifactError
    (cannot be read).
    """
    path = Path(path)
    digest, header_bytes = _digest(path)
    if verify not in (None, digest):
        raise CorruptArtifact(
            f"{path} is damaged: its SHA-256 is {digest}, it must be {verify}; fetch or upload it again"
        )
    try:
        reader = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise CorruptArtifact(
            f"{path} is damaged, cut short or not an artifact ({error}); fetch or make it again"
        ) from error
    metadata = _metadata(reader)
    if METADATA_KEY not in metadata:
        raise CorruptArtifact(
            f"{path} is no artifact: a safetensors file without {METADATA_KEY!r} metadata; compress it first"
        )
    try:
        manifest = parse(metadata[METADATA_KEY])
        keys, file_names = _index(reader, manifest)
    except ArtifactError as error:
        raise type(error)(f"{path} cannot be used: {error}") from error
    return Artifact(path, digest, manifest, keys, file_names, header_bytes, reader)


def _digest(path: Path) -> tuple[str, int]:
    """The file's SHA-256, and how many bytes come before its first tensor."""
    try:
        with path.open("rb") as file:
            header_bytes = 8 + int.from_bytes(file.read(8), "little")
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    if header_bytes > HEADER_LIMIT_BYTES:
        raise CorruptArtifact(
            f"{path} is no artifact: its header would have {header_bytes} bytes, over {HEADER_LIMIT_BYTES}"
        )
    return digest, header_bytes


def _metadata(reader: Any) -> dict[str, str]:
    return reader.metadata() or {}


def _index(reader: Any, manifest: Manifest) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    keys: dict[str, list[int]] = {}
    file_names = []
    for key in sorted(reader.keys()):
        tensor = reader.get_slice(key)
        shape = tensor.get_shape()
        if tensor.get_dtype() != "U8" or len(shape) != 1:
            raise CorruptArtifact(f"{key} is {tensor.get_dtype()} {shape}, not a run of bytes")
        if key.startswith(FILE_PREFIX):
            file_names.append(_file_name(key))
        else:
            name, index = _split_key(key, len(manifest.parts))
            check_length(manifest.parts[index], shape[0])
            keys.setdefault(name, []).append(index)
    for name, indices in keys.items():
        _check_agree(name, [manifest.parts[index] for index in sorted(indices)])
    return {sys.intern(name): tuple(sorted(keys[name])) for name in sorted(keys)}, tuple(file_names)


def _split_key(key: str, count: int) -> tuple[str, int]:
    name, _, index = key.rpartition(":")
    if not name or not re.fullmatch(r"0|[1-9][0-9]{0,5}", index) or int(index) >= count:
        raise CorruptArtifact(f"the key {key!r} is not '<parameter>:<index below {count}>'")
    return name, int(index)


def _file_name(key: str) -> str:
    name = key.removeprefix(FILE_PREFIX)
    if not FILE_NAME.fullmatch(name):
        raise CorruptArtifact(f"{name!r} is not the plain name of a file")
    return name


def _check_agree(name: str, specs: list[Spec]) -> None:
    if len({(spec.shape, spec.transposed) for spec in specs}) > 1:
        raise CorruptArtifact(f"the parts of {name} differ in shape: {[list(spec.shape) for spec in specs]}")
    if len(specs) > 1 and any(isinstance(spec, XorSpec) for spec in specs):
        raise CorruptArtifact(f"the lossless delta of {name} has further parts")


def _write(path: Path, tensors: Mapping[str, bytes], manifest: str) -> str:
    """Through a temporary file beside ``path``, which is opened as a reader would before it takes that name."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        arrays = {key: np.frombuffer(content, np.uint8) for key, content in tensors.items()}
        save_file(arrays, temporary, {METADATA_KEY: manifest})
        temporary.chmod(0o644)
        digest = open_artifact(temporary).digest
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return digest
