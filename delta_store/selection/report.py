"""The quality report of a selected artifact: everything measured on held-out text that the search did not see."""

from collections.abc import Mapping

from pydantic import JsonValue

from deltaserve.delta_store.quality import Quality, gain_kept
from deltaserve.delta_store.report import report
from deltaserve.delta_store.selection.candidate import Candidate
from deltaserve.delta_store.selection.journal import Point
from deltaserve.delta_store.selection.texts import Files


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
        gain_kept=gain_kept(base.loss if base else None, point.loss_fine_tuned, point.loss),
        kl_base=base.kl if base else None,
        top1_agreement_base=base.agreement if base else None,
    )


def full_report(
    files: Files,
    point: Point,
    base: Point | None,
    dare: tuple[Candidate, Point],
    seeds: Mapping[int, Point],
    size: Mapping[str, int],
    tolerance: Mapping[str, JsonValue],
) -> dict[str, JsonValue]:
    """As it is written into the artifact: every artifact's report, the spread over seeds, and what was asked."""
    scores: dict[str, JsonValue] = {
        "score_base": base.score if base else None,
        "score_fine_tuned": point.score_fine_tuned,
        "score_artifact": point.score,
    }
    candidate, dare_point = dare
    return {
        **report(
            files.confirmed_on, quality(point, base), size, quality(dare_point, base), candidate.label, dare_point.bytes
        ),
        **(scores if files.is_task else {}),
        "seeds": {str(seed): {"kl_mean": p.kl, "top1_agreement": p.agreement} for seed, p in seeds.items()},
        "tolerance": dict(tolerance),
    }
