"""What an artifact holds, as plain data: for people as a table, for programs as JSON."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from deltaserve.delta_store.codec.artifact import Artifact, open_artifact


@dataclass(frozen=True, slots=True)
class Row:
    """All parts of one kind and codec: so many tensors, bytes, and weights that they stand for."""

    kind: str
    codec: str
    tensors: int
    size_bytes: int
    weights: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size_bytes / self.weights


@dataclass(frozen=True, slots=True)
class Inspection:
    """``rows`` by kind; ``overhead_bytes`` of header and files; the rest is the manifest's."""

    path: str
    digest: str
    size_bytes: int
    format_version: int
    base: str
    profile: str | None
    tied_head: bool
    provenance: dict[str, Any]
    quality: dict[str, Any] | None
    rows: tuple[Row, ...]
    overhead_bytes: dict[str, int]
    files: tuple[str, ...]


def inspect(path: str | Path) -> Inspection:
    """Look into an artifact without decoding it. Raises what ``open_artifact`` raises."""
    artifact = open_artifact(path)
    manifest = artifact.manifest
    return Inspection(
        path=str(path),
        digest=artifact.digest,
        size_bytes=artifact.path.stat().st_size,
        format_version=manifest.format_version,
        base=manifest.base,
        profile=manifest.profile,
        tied_head=manifest.tied_head,
        provenance=manifest.provenance,
        quality=manifest.quality,
        rows=_rows(artifact),
        overhead_bytes={kind: size for kind, size in artifact.totals().items() if kind in ("header", "files")},
        files=artifact.file_names,
    )


def _rows(artifact: Artifact) -> tuple[Row, ...]:
    found: dict[tuple[str, str], Row] = {}
    for name in artifact.names:
        for spec, size in zip(artifact.specs(name), artifact.part_bytes(name), strict=True):
            codec = spec.dtype if spec.kind == "xor" else spec.codec
            kind = f"{spec.kind} ({spec.mask})" if spec.kind == "sparse" else spec.kind
            old = found.get((kind, codec), Row(kind, codec, 0, 0, 0))
            weights = old.weights + prod(spec.shape)
            found[kind, codec] = Row(kind, codec, old.tensors + 1, old.size_bytes + size, weights)
    return tuple(sorted(found.values(), key=lambda row: -row.size_bytes))
