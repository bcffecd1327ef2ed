"""From a fine-tune to its artifact, tensor by tensor.

Peak memory is about four times the largest tensor in float32 (base, fine-tune, their difference, and what a method
needs of it) and twice the encoded output; never a whole model. Computing a base's profile for the first time, tuning
and measuring take as much of a model as ``memory`` says (``running/``), measuring also 4 bytes for each scored token
and word of the vocabulary, tuning q twice that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from deltaserve.delta_store.artifact_file import ArtifactFile, Parts, is_weighted
from deltaserve.delta_store.calibration import BUILT_IN, calibration_samples, profile_for
from deltaserve.delta_store.checkpoint import Checkpoint, open_checkpoint
from deltaserve.delta_store.codec.artifact import Artifact
from deltaserve.delta_store.encoding import Count, divisors, encode_parts, facts_of
from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.fine_tune import FineTune, open_fine_tune
from deltaserve.delta_store.fingerprint import fingerprint
from deltaserve.delta_store.lora import is_adapter
from deltaserve.delta_store.profile import Profile
from deltaserve.delta_store.pruning.methods import KEPT, METHODS, Method
from deltaserve.delta_store.pruning.methods import method as method_named
from deltaserve.delta_store.pruning.options import Options, Value
from deltaserve.delta_store.pruning.tuning import TUNING_TOKENS, divided
from deltaserve.delta_store.pruning.weights import BaseFacts
from deltaserve.delta_store.quality import EVALUATION_TOKENS, Judge, Quality, check_answers, predicts_tokens
from deltaserve.delta_store.report import plain_dare, report, sizes
from deltaserve.delta_store.running.memory import AUTO, check_memory, runner_for
from deltaserve.delta_store.selection.candidate import Candidate
from deltaserve.delta_store.text import Sample, read_samples, tokenizer_of

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""

BUILT_IN_TOKENS = 1024
"""Scored tokens of the built-in prose: enough to see that an artifact is sound; a judgement needs text of its own."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was written. ``full_bytes`` is the whole fine-tune in 16 bits; ``profile`` the digest that serving needs.

    ``text`` names what it was measured on, None where it was not; ``memory`` says how much of a model was in memory to
    tune and measure, and why.
    ``tensors_changed`` of ``tensors_total`` differ from the base's. ``q`` are the least and the largest number that
    tuning found to divide survivors by. ``warnings`` are for the user's eyes.
    """

    path: str
    digest: str
    size_bytes: int
    full_bytes: int
    method: str
    tensors_changed: int
    tensors_total: int
    profile: str | None
    q: tuple[float, float] | None
    warnings: tuple[str, ...]
    quality: Quality | None
    text: str | None = None
    memory: str | None = None

    @property
    def ratio(self) -> float:
        """How many times smaller than the whole 16-bit fine-tune, everything counted."""
        return self.full_bytes / self.size_bytes


def compress(
    base: str | Path,
    fine_tuned: str | Path,
    out: Path,
    *,
    method: str | None = None,
    options: Mapping[str, Value] | None = None,
    calibration: Path | None = None,
    profile: Path | None = None,
    evaluate: Path | None = None,
    measure: bool = True,
    memory: str = AUTO,
    progress: Progress = lambda stage, done, total: None,
) -> Receipt:
    """Write the artifact of ``fine_tuned`` (a checkpoint or a LoRA adapter) against ``base`` to ``out``.

    ``method`` is a key of ``METHODS``, by default ``weighted``, for an adapter ``lora``; ``options`` are those that it
    takes. ``calibration`` is text for the base's profile or for tuning, where the method needs one;
    ``profile`` is a file to take the profile from, or to write it to. ``evaluate`` is text to measure on, by default
    prose that every Python has; its report goes into the artifact, unless ``measure`` is False or the fine-tune
    predicts no tokens; ``memory`` (of ``MEMORY``) is how. The same input, options and seed give the same file. Raises
    OptionError and what opening the checkpoints raises; then nothing is written.
    """
    chosen = method_for(method, fine_tuned)
    settings = chosen.options(options or {})
    check_output(out)
    _check_measuring(memory, chosen, evaluate, measure=measure)
    _check_text(chosen, settings, calibration, profile)
    base_checkpoint = open_checkpoint(base)
    fine_tune = open_fine_tune(fine_tuned, base_checkpoint)
    check_fits(chosen, fine_tune)
    held_out = _evaluation_samples(evaluate, base_checkpoint, fine_tune) if measure else None
    tuned_on = _tuning_samples(settings, calibration, base_checkpoint, fine_tune) if chosen.tune else []
    progress("Fingerprint", 0, 1)
    base_fingerprint = fingerprint(base_checkpoint)
    weights = None
    if chosen.needs_profile:
        stage = stage_of(progress, "Profile of the base")
        weights = profile_for(base_checkpoint, base_fingerprint, calibration, profile, stage, memory)
    facts = facts_of(base_checkpoint.architecture, weights)
    parts = encode_parts(chosen, settings, base_checkpoint, fine_tune, facts, stage_of(progress, "Compress"))
    needed = weights if is_weighted(parts) else None
    warnings = () if parts else (f"{fine_tune.folder.name} equals the base, so the artifact holds no delta",)
    file = ArtifactFile(out, base_checkpoint, fine_tune, base_fingerprint, needed, chosen, settings, warnings)
    quality, written, text, in_memory = None, None, None, None
    if chosen.tune or held_out is not None:
        runner, in_memory = runner_for(memory, fine_tune.parameters)
    if chosen.tune:
        with file.draft(parts) as draft:
            stage = stage_of(progress, "Tune")
            tuned = chosen.tune(base_checkpoint, fine_tune, draft, tuned_on, settings, runner, stage)
            parts = divided(parts, tuned)
    if held_out is not None:
        text = BUILT_IN if evaluate is None else evaluate.name
        judge = Judge(base_checkpoint, fine_tune, held_out, runner, stage_of(progress, "Evaluate"))
        quality, written = _report(judge, file, parts, facts, text)
    digest = file.write(out, parts, written)
    return Receipt(
        path=str(out),
        digest=digest,
        size_bytes=out.stat().st_size,
        full_bytes=2 * fine_tune.parameters,
        method=chosen.name,
        tensors_changed=len({name for name, _, _ in parts}),
        tensors_total=fine_tune.tensor_count,
        profile=needed.digest if needed else None,
        q=divisors(parts) if chosen.tune else None,
        warnings=warnings,
        quality=quality,
        text=text,
        memory=in_memory,
    )


def _report(
    judge: Judge, file: ArtifactFile, parts: Parts, facts: BaseFacts, text: str
) -> tuple[Quality, dict[str, JsonValue]]:
    """What the artifact keeps of the text, and its report: the same of plain DARE beside it."""
    with file.draft(parts) as draft:
        quality, size = _quality(judge, draft, file.profile, text), sizes(draft, facts.embeddings)
        kept = {name: getattr(file.options, name) if name in file.method.defaults else KEPT[name] for name in KEPT}
        settings = plain_dare(file.base, draft, facts.embeddings, kept)
    dare = METHODS["dare"]
    options = dare.options(settings)
    dare_parts = encode_parts(dare, options, file.base, file.fine_tune, facts)
    with replace(file, profile=None, method=dare, options=options).draft(dare_parts) as draft:
        made_by, used = Candidate(dare.name, tuple(sorted(settings.items()))).label, draft.path.stat().st_size
        return quality, report(text, quality, size, _quality(judge, draft, None, text), made_by, used)


def _quality(judge: Judge, draft: Artifact, profile: Profile | None, text: str) -> Quality:
    """What a draft keeps; of built-in prose not which share of the gain, for fine-tuning sought none there."""
    found = judge.quality(draft, profile)
    return replace(found, gain_kept=None) if text == BUILT_IN else found


def method_for(name: str | None, fine_tuned: str | Path) -> Method:
    """The method of this name, or the default for this kind of fine-tune."""
    return method_named(name or ("lora" if is_adapter(fine_tuned) else "weighted"))


def check_output(out: Path) -> None:
    """Raise OptionError where no file can be written."""
    if out.is_dir():
        raise OptionError(f"{out} is a folder; name the artifact's file")
    if not out.absolute().parent.is_dir():
        raise OptionError(f"The folder {out.absolute().parent} does not exist; make it first")


def _check_measuring(memory: str, chosen: Method, evaluate: Path | None, *, measure: bool) -> None:
    check_memory(memory)
    if evaluate is not None and not measure:
        raise OptionError(f"Without a report nothing is measured on {evaluate}; leave one of the two out")
    if memory != AUTO and not (measure or chosen.needs_profile or chosen.tune):
        raise OptionError(
            f"The method {chosen.name} runs no model but to measure; leave memory out, or have it measure"
        )


def _check_text(chosen: Method, settings: Options, calibration: Path | None, profile: Path | None) -> None:
    if profile and not chosen.needs_profile:
        raise OptionError(f"The method {chosen.name} uses no activation profile; leave profile out")
    if calibration and not (chosen.needs_profile or chosen.tune):
        raise OptionError(f"The method {chosen.name} runs no text (no activation profile, no tuning); leave it out")
    if settings.judge == "labels" and calibration is None:
        raise OptionError("To judge by labels, text with answers is needed; give calibration, or judge by output")


def check_fits(chosen: Method, fine_tune: FineTune) -> None:
    """Refuse a method that is not for this kind of fine-tune."""
    fits = [m.name for m in METHODS.values() if (m.for_adapters if fine_tune.is_adapter else m.for_checkpoints)]
    if chosen.name not in fits:
        kind = "a LoRA adapter" if fine_tune.is_adapter else "a full checkpoint"
        raise OptionError(f"The method {chosen.name} cannot store {kind}; use one of: {', '.join(fits)}")


def _evaluation_samples(path: Path | None, base: Checkpoint, fine_tune: FineTune) -> list[Sample] | None:
    """Those of the text; without one, of built-in prose, or None where there is nothing to predict of it."""
    tokenizer = tokenizer_of(fine_tune.folder, base.folder)
    if path is None:
        if tokenizer is None or not predicts_tokens(fine_tune):
            return None
        return calibration_samples(base, None, BUILT_IN_TOKENS, fine_tune.folder, base.folder)
    if tokenizer is None:
        raise OptionError("Neither base nor fine-tune has a tokenizer, so no text can be evaluated")
    samples = read_samples(path, tokenizer, EVALUATION_TOKENS)
    check_answers(path, samples, fine_tune)
    return samples


def _tuning_samples(settings: Options, text: Path | None, base: Checkpoint, fine_tune: FineTune) -> list[Sample]:
    if settings.judge == "labels" and base.architecture.head is None:
        raise OptionError(f"{base.architecture.name} predicts no tokens, so labels cannot judge it; judge by output")
    return calibration_samples(base, text, TUNING_TOKENS, fine_tune.folder, base.folder)


def stage_of(progress: Progress, name: str) -> Count:
    """The progress of one stage."""
    return lambda done, total: progress(name, done, total)
