"""The quality report of a selected artifact: everything measured on held-out text that the search did not see."""

from collections.abc import Mapping
from dataclasses import asdict
from math import prod

from pydantic import JsonValue

from deltaserve.delta_store.codec.artifact import Artifact
from deltaserve.delta_store.codec.specs import SparseSpec
from deltaserve.delta_store.quality import Quality
from deltaserve.delta_store.selection.candidate import Candidate
from deltaserve.delta_store.selection.journal import Point
from deltaserve.kernels.codes import BITS, FLOAT_CODECS


def quality(point: Point, base: Point | None) -> Quality:
    """The figures that every report has."""
    return Quality(
        tokens=point.tokens,
        kl_mean=point.kl,
        kl_p99=point.kl_p99,
        top1_agreement=point.agreement,
        loss_base=base.loss if base else None,
        loss_fine_tuned=point.loss_fine_tuned,
        loss_artifact=point.loss,
    )


def gain_kept(point: Point, base: Point | None) -> float | None:
    """Which share of what fine-tuning gained in loss is kept; None where it gained nothing on this text."""
    gained = base.loss - base.loss_fine_tuned if base else 0.0
    return (base.loss - point.loss) / gained if base and gained > 0 else None


def report(
    point: Point,
    base: Point | None,
    dare: tuple[Candidate, Point],
    seeds: Mapping[int, Point],
    size: Mapping[str, JsonValue],
    tolerance: Mapping[str, JsonValue],
    is_task: bool,
) -> dict[str, JsonValue]:
    """As it is written into the artifact. ``dare`` is plain DARE at the same bytes, or as near as it comes."""
    scores: dict[str, JsonValue] = {
        "score_base": base.score if base else None,
        "score_fine_tuned": point.score_fine_tuned,
        "score_artifact": point.score,
    }
    return {
        **asdict(quality(point, base)),
        "gain_kept": gain_kept(point, base),
        "kl_base": base.kl if base else None,
        "top1_agreement_base": base.agreement if base else None,
        **(scores if is_task else {}),
        "dare": {
            "made_by": dare[0].label,
            "bytes": dare[1].bytes,
            "kl_mean": dare[1].kl,
            "top1_agreement": dare[1].agreement,
            "loss": dare[1].loss,
            "gain_kept": gain_kept(dare[1], base),
        },
        "seeds": {str(seed): {"kl_mean": p.kl, "top1_agreement": p.agreement} for seed, p in seeds.items()},
        "bytes": dict(size),
        "tolerance": dict(tolerance),
    }


def sizes(artifact: Artifact, embeddings: frozenset[str]) -> dict[str, JsonValue]:
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


def _sparse_values(spec: SparseSpec) -> int:
    """Bytes of the survivors and their scales."""
    count = prod((spec.blocks, spec.kept, spec.block))
    scales = 0 if spec.codec in FLOAT_CODECS else -(-count // spec.group) * 2
    return -(-count * BITS[spec.codec] // 8) + scales
