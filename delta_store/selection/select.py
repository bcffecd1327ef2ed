"""From a fine-tune and a tolerance to the smallest artifact within it.

Beside what compressing takes (about four of the largest tensor), measuring takes as much of a model in float32 as
``memory`` says (``running/``), and 4 bytes for each scored token and word of the vocabulary.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pydantic import JsonValue

from deltaserve.delta_store.artifact_file import deltaserve_version
from deltaserve.delta_store.cache_folder import identity
from deltaserve.delta_store.calibration import profile_for
from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.compress import (
    Progress,
    Receipt,
    check_fits,
    check_output,
    method_for,
    stage_of,
)
from deltaserve.delta_store.encoding import facts_of
from deltaserve.delta_store.errors import OptionError, ToleranceMissed
from deltaserve.delta_store.fine_tune import FineTune, open_fine_tune
from deltaserve.delta_store.fingerprint import fingerprint
from deltaserve.delta_store.profile import Profile
from deltaserve.delta_store.pruning.methods import KEPT
from deltaserve.delta_store.pruning.options import Value
from deltaserve.delta_store.report import least_density, sizes
from deltaserve.delta_store.running.memory import AUTO, check_memory, runner_for
from deltaserve.delta_store.selection.approach import approach, best_of
from deltaserve.delta_store.selection.bench import Bench
from deltaserve.delta_store.selection.candidate import Candidate, families
from deltaserve.delta_store.selection.delta_size import delta_size
from deltaserve.delta_store.selection.journal import Journal, Point
from deltaserve.delta_store.selection.laboratory import BASE, Laboratory
from deltaserve.delta_store.selection.plot import can_plot, check_plot, draw
from deltaserve.delta_store.selection.report import full_report, quality
from deltaserve.delta_store.selection.search import HELD_OUT, SHORT, Found, Search
from deltaserve.delta_store.selection.texts import Files, read_texts
from deltaserve.delta_store.selection.tolerance import Goal, Tolerance
from deltaserve.delta_store.text import Sample

SEEDS = 3
DARE_ROUNDS = 4
NO_FILES = Files(None, None)


@dataclass(frozen=True, slots=True)
class Selection:
    """What was written and why. ``path`` says in words how the search went; ``report`` is the artifact's own.

    ``met``: within the tolerance on held-out text. ``tried`` counts measured points, ``resumed`` those that an earlier
    run had left in ``journal``. ``plot`` is None where nothing was drawn.
    """

    receipt: Receipt
    met: bool
    chosen: str
    path: tuple[str, ...]
    report: Mapping[str, JsonValue]
    tried: int
    resumed: int
    journal: str
    plot: str | None


def select(
    base: str | Path,
    fine_tuned: str | Path,
    out: Path,
    tolerance: Tolerance,
    *,
    method: str | None = None,
    options: Mapping[str, Value] | None = None,
    files: Files = NO_FILES,
    profile: Path | None = None,
    plot: Path | None = None,
    draws: bool = True,
    force: bool = False,
    memory: str = AUTO,
    progress: Progress = lambda stage, done, total: None,
) -> Selection:
    """Write the smallest artifact of ``fine_tuned`` within ``tolerance`` to ``out``.

    ``method`` and ``options`` narrow the search. The base's activation profile is that of the built-in text, one for
    all fine-tunes, unless ``profile`` is a file. Points that were tried are kept in ``<out>.search.jsonl``; a second
    call with the same input measures none of them again. They are drawn beside it or in ``plot``, unless ``draws`` is
    false. ``memory`` is one of ``MEMORY``. Raises ToleranceMissed where nothing is within the tolerance
    (then nothing is written; with ``force`` the nearest is), OptionError, and what opening the checkpoints raises.
    """
    check_memory(memory)
    given = _checked(method, options or {}, fine_tuned, out, plot, tolerance, files)
    base_checkpoint = open_checkpoint(base)
    if base_checkpoint.architecture.head is None:
        raise OptionError(f"{base_checkpoint.architecture.name} predicts no tokens, so no tolerance can be measured")
    fine_tune = open_fine_tune(fine_tuned, base_checkpoint)
    if method:
        check_fits(method_for(method, fine_tuned), fine_tune)
    found_families = families(fine_tune.is_adapter, method, given, least_density(base_checkpoint))
    if not found_families:
        raise OptionError(
            f"No method that is searched takes all of: {', '.join(given)}; leave one out, or name a method"
        )
    texts = read_texts(files, base_checkpoint, fine_tune)
    base_fingerprint = fingerprint(base_checkpoint)
    stage = stage_of(progress, "Profile of the base")
    shared = profile_for(base_checkpoint, base_fingerprint, None, profile, stage, memory)
    journal = Journal(_beside(out, ".search.jsonl"), _identity(base_fingerprint, fine_tune, texts, shared))
    resumed = len(journal.points)
    stages = _Stages(progress)
    runner, in_memory = runner_for(memory, fine_tune.parameters)
    laboratory = Laboratory(
        out,
        base_checkpoint,
        base_fingerprint,
        fine_tune,
        shared,
        texts,
        journal,
        Bench(base_checkpoint, fine_tune, runner),
        stages.step,
    )
    size = delta_size(fine_tune, facts_of(base_checkpoint.architecture, shared).embeddings)
    settled = tuple(given) if size.has_embeddings else (*given, "rank", "embedding_codec")
    search = Search(tolerance, laboratory.point, laboratory.of_base, settled, stages.begin, [size.label])
    found = search.run(found_families)
    picture = plot or (_beside(out, ".search.png") if draws and can_plot() else None)
    if picture:
        draw(picture, _tried(journal), found.trial.candidate, _kl_limit(found))
    if not (found.confirmed or force):
        raise ToleranceMissed(_missed(tolerance, found))
    warnings = _warnings(size.warning if size.is_pretraining else None, found, tolerance, files, laboratory)
    stages.begin("Report")
    receipt, written = _write(laboratory, found, tolerance, files, warnings)
    return Selection(
        receipt=replace(receipt, memory=in_memory),
        met=found.confirmed,
        chosen=found.trial.candidate.label,
        path=found.notes,
        report=written,
        tried=len(journal.points),
        resumed=resumed,
        journal=str(journal.path),
        plot=str(picture) if picture else None,
    )


class _Stages:
    """The progress of a search, which does not know how many points it will take."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._name, self._count = progress, "", 0

    def begin(self, name: str) -> None:
        self._name, self._count = name, 0
        self._progress(name, 0, 1)

    def step(self) -> None:
        self._count += 1
        self._progress(self._name, self._count, self._count + 1)


def _checked(
    method: str | None,
    given: Mapping[str, Value],
    fine_tuned: str | Path,
    out: Path,
    plot: Path | None,
    tolerance: Tolerance,
    files: Files,
) -> Mapping[str, Value]:
    """The options, after everything was refused that can be before any work."""
    check_output(out)
    check_plot(plot)
    if method is not None:
        method_for(method, fine_tuned).options(given)
    if searched := sorted({"judge", "per"} & given.keys()):
        raise OptionError(f"With a tolerance the search itself finds q, so {searched[0]} has no meaning; leave it out")
    if (tolerance.kind == "min_score") != files.is_task:
        raise OptionError("A score needs a task: give both --task, a file of prompts and answers, and --min-score")
    return given


def _identity(
    base_fingerprint: str, fine_tune: FineTune, texts: Mapping[str, Sequence[Sample]], profile: Profile
) -> str:
    """A digest over everything that decides what a candidate measures."""
    files = identity(path for path in fine_tune.folder.iterdir() if path.is_file())
    samples = {name: [(sample.ids, sample.start) for sample in text] for name, text in texts.items()}
    seen = repr((base_fingerprint, files, samples, profile.digest, deltaserve_version()))
    return hashlib.sha256(seen.encode()).hexdigest()


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


def _tried(journal: Journal) -> list[tuple[Candidate, str, Point]]:
    points = journal.points.items()
    return [(Candidate.from_key(key), text, point) for (key, text), point in points if key != BASE]


def _kl_limit(found: Found) -> float | None:
    return found.allowed.allowed if found.allowed.error == "kl" else None


def _missed(tolerance: Tolerance, found: Found) -> str:
    point, trial = found.held_out, found.trial
    return (
        f"Nothing is within the tolerance ({tolerance.label}) on held-out text. Nearest: {trial.candidate.label}, "
        f"{trial.point.bytes:,} bytes, KL {point.kl:.4g}, top-1 agreement {point.agreement:.2%}, "
        f"score {point.score:.1%}. Allow more, or write this one with --force"
    )


def _warnings(
    pretraining: str | None, found: Found, tolerance: Tolerance, files: Files, laboratory: Laboratory
) -> tuple[str, ...]:
    base = laboratory.of_base(HELD_OUT)
    warnings = [pretraining] if pretraining else []
    if files.calibration is None:
        warnings.append("No calibration text was given, so losses are those on Python's documentation; give your own")
    if base and tolerance.kind != "bytes" and found.allowed.fits(base):
        warnings.append("The bare base is within this tolerance, so the fine-tune hardly shows on this text")
    if not found.confirmed:
        warnings.append(f"Not within the tolerance ({tolerance.label}) on held-out text; written because it was forced")
    return tuple(warnings)


def _write(
    laboratory: Laboratory, found: Found, tolerance: Tolerance, files: Files, warnings: tuple[str, ...]
) -> tuple[Receipt, Mapping[str, JsonValue]]:
    """The artifact with its report."""
    candidate, out = found.trial.candidate, laboratory.out
    base = laboratory.of_base(HELD_OUT)
    seeds = _seeds(laboratory, candidate)
    dare = _plain_dare(laboratory, found.trial.point.bytes, candidate)
    parts = laboratory.parts(candidate)
    file = laboratory.file(candidate, parts, warnings)
    with file.draft(parts) as artifact:
        embeddings = facts_of(laboratory.base.architecture, laboratory.profile).embeddings
        size = sizes(artifact, embeddings)
    allowed: dict[str, JsonValue] = {"asked": tolerance.label, "met": found.confirmed}
    written = full_report(files, found.held_out, base, dare, seeds, size, allowed)
    digest = file.write(out, parts, written)
    fine_tune = laboratory.fine_tune
    receipt = Receipt(
        path=str(out),
        digest=digest,
        size_bytes=out.stat().st_size,
        full_bytes=2 * fine_tune.parameters,
        method=candidate.method,
        tensors_changed=len(open_artifact(out).names),
        tensors_total=fine_tune.tensor_count,
        profile=file.profile.digest if file.profile else None,
        q=None,
        warnings=warnings,
        quality=quality(found.held_out, base),
        text=files.confirmed_on,
    )
    return receipt, written


def _seeds(laboratory: Laboratory, candidate: Candidate) -> dict[int, Point]:
    """The candidate drawn with its own and the next seeds, on held-out text; none where nothing is drawn."""
    own = dict(candidate.settings).get("seed")
    if own is None:
        return {}
    return {s: laboratory.point(candidate.with_seed(s), HELD_OUT) for s in range(int(own), int(own) + SEEDS)}


def _plain_dare(laboratory: Laboratory, size: int, candidate: Candidate) -> tuple[Candidate, Point]:
    """DARE as published (a mask of its own for every row, 16-bit values) at about as many bytes, on held-out text."""
    kept = {name: value for name, value in candidate.settings if name in KEPT}
    given: dict[str, Value] = {"block": 1, "codec": "bf16", **KEPT, **kept}
    (family,) = families(False, "dare", given, least_density(laboratory.base))[:1]
    goal = Goal("bytes", size)
    trials = approach(family, goal, partial(laboratory.point, text=SHORT), family.start, DARE_ROUNDS)
    nearest = best_of(trials, goal) or min(trials, key=lambda trial: trial.point.bytes)
    return nearest.candidate, laboratory.point(nearest.candidate, HELD_OUT)
