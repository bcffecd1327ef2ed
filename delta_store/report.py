"""What an artifact's quality report says beside its own losses: its bytes, and plain DARE in as many."""

from collections.abc import Mapping
from dataclasses import asdict
from math import prod

from pydantic import JsonValue

from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.codec.artifact import Artifact
from deltaserve.delta_store.codec.specs import SparseSpec
from deltaserve.delta_store.delta import is_whole
from deltaserve.delta_store.pruning.options import Value
from deltaserve.delta_store.quality import Quality
from deltaserve.kernels.codes import BITS, FLOAT_CODECS

LEAST_KEPT = 0.75
"""Columns of the narrowest weight that the lowest density keeps, before rounding to one."""

DARE_BYTES = 2
"""Of a survivor of plain DARE: 16 bits, and no index, for its seed gives it."""


def sizes(artifact: Artifact, embeddings: frozenset[str]) -> dict[str, int]:
    """Bytes by what they are for; all of the file but its header."""
    found = dict.fromkeys(("linear_values", "indices", "embeddings", "norms_and_biases"), 0)
    for name in artifact.names:
        for spec, size in zip(artifact.specs(name), artifact.part_bytes(name), strict=True):
            if name in embeddings:
                found["embeddings"] += size
            elif len(spec.shape) == 1:
                found["norms_and_biases"] += size
            else:
                indices = size - _sparse_values(spec) if isinstance(spec, SparseSpec) else 0
                found["indices"] += indices
                found["linear_values"] += size - indices
    return {**found, "files": artifact.totals().get("files", 0)}


def plain_dare(
    base: Checkpoint, artifact: Artifact, embeddings: frozenset[str], kept: Mapping[str, Value]
) -> dict[str, Value]:
    """DARE as published (a mask of its own for every row, 16-bit values) with the bytes that the linear weights have.

    Or with the fewest that it can have: one number a row. ``kept`` says how all else is stored: as in the artifact.
    """
    shapes = {name: artifact.specs(name)[0].shape for name in artifact.names if name not in embeddings}
    numbers = sum(prod(shape) for name, shape in shapes.items() if len(shape) == 2 and not is_whole(base, name, shape))
    found = sizes(artifact, embeddings)
    density = (found["linear_values"] + found["indices"]) / (DARE_BYTES * numbers) if numbers else 1.0
    drop = round(1 - min(1.0, max(density, least_density(base))), 6)
    return {"drop": drop, "block": 1, "codec": "bf16", **kept}


def least_density(base: Checkpoint) -> float:
    """With which every weight keeps a column."""
    shapes = ((name, base.shape(name)) for name in base.names)
    transposed = base.architecture.transposed
    return LEAST_KEPT / min(shape[0 if name in transposed else 1] for name, shape in shapes if len(shape) == 2)


def report(
    text: str, quality: Quality, size: Mapping[str, int], dare: Quality, dare_label: str, dare_bytes: int
) -> dict[str, JsonValue]:
    """As it is written into an artifact. ``text`` is the name of what was measured on, ``dare`` plain DARE at the same
    bytes, or as near as it comes.
    """
    return {
        "text": text,
        **asdict(quality),
        "dare": {
            "made_by": dare_label,
            "bytes": dare_bytes,
            "kl_mean": dare.kl_mean,
            "top1_agreement": dare.top1_agreement,
            "loss": dare.loss_artifact,
            "gain_kept": dare.gain_kept,
        },
        "bytes": dict(size),
    }


def _sparse_values(spec: SparseSpec) -> int:
    """Bytes of the survivors and their scales."""
    count = prod((spec.blocks, spec.kept, spec.block))
    scales = 0 if spec.codec in FLOAT_CODECS else -(-count // spec.group) * 2
    return -(-count * BITS[spec.codec] // 8) + scales
