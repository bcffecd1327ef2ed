"""From a fine-tune to its artifact, tensor by tensor.

Peak memory is about four times the largest tensor in float32 (base, fine-tune, their difference, and what a method
needs of it) and twice the encoded output; never a whole model. Two things that are only done when they are needed do
hold models: computing a base's profile for the first time (one model), tuning q and ``evaluate`` (two).
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import JsonValue

from deltaserve.delta_store.architecture import Architecture
from deltaserve.delta_store.calibration import calibration_samples, profile_for
from deltaserve.delta_store.checkpoint import Checkpoint, open_checkpoint
from deltaserve.delta_store.codec.artifact import Artifact, open_artifact, write_artifact
from deltaserve.delta_store.codec.parts import Stored
from deltaserve.delta_store.codec.specs import FactorsSpec, SparseSpec, Spec
from deltaserve.delta_store.errors import OptionError, UnsupportedCheckpoint
from deltaserve.delta_store.fine_tune import Change, FineTune, open_fine_tune
from deltaserve.delta_store.fingerprint import fingerprint
from deltaserve.delta_store.heads import config_file
from deltaserve.delta_store.heap import give_back
from deltaserve.delta_store.lora import is_adapter
from deltaserve.delta_store.plain_model import embedding_names
from deltaserve.delta_store.profile import Profile
from deltaserve.delta_store.pruning.methods import METHODS, Method
from deltaserve.delta_store.pruning.methods import method as method_named
from deltaserve.delta_store.pruning.options import Options, Value
from deltaserve.delta_store.pruning.tuning import TUNING_TOKENS, divided
from deltaserve.delta_store.pruning.weights import BaseFacts
from deltaserve.delta_store.pruning.whole import Encoded, dense, exact_codec
from deltaserve.delta_store.quality import EVALUATION_TOKENS, Quality, check_answers, measure
from deltaserve.delta_store.text import Sample, read_samples, tokenizer_of
from deltaserve.delta_store.variant_files import differing_files

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""

Count = Callable[[int, int], None]
"""The same within one stage."""

Parts = list[tuple[str, Spec, Stored]]
"""By parameter name, what stands for its delta."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was written. ``full_bytes`` is the whole fine-tune in 16 bits; ``profile`` the digest that serving needs.

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
    progress: Progress = lambda stage, done, total: None,
) -> Receipt:
    """Write the artifact of ``fine_tuned`` (a checkpoint or a LoRA adapter) against ``base`` to ``out``.

    ``method`` is a key of ``METHODS``, by default ``weighted``, for an adapter ``lora``; ``options`` are those that it
    takes. ``calibration`` is text for the base's profile or for tuning, where the method needs one;
    ``profile`` is a file to take the profile from, or to write it to. ``evaluate`` is text to measure on; its report
    goes into the artifact. The same input, options and seed give the same file. Raises OptionError and what opening
    the checkpoints raises; then nothing is written.
    """
    chosen = method_for(method, fine_tuned)
    settings = chosen.options(options or {})
    check_output(out)
    _check_text(chosen, settings, calibration, profile)
    base_checkpoint = open_checkpoint(base)
    fine_tune = open_fine_tune(fine_tuned, base_checkpoint)
    check_fits(chosen, fine_tune)
    held_out = None if evaluate is None else _evaluation_samples(evaluate, base_checkpoint, fine_tune)
    tuned_on = _tuning_samples(settings, calibration, base_checkpoint, fine_tune) if chosen.tune else []
    progress("Fingerprint", 0, 1)
    base_fingerprint = fingerprint(base_checkpoint)
    weights = None
    if chosen.needs_profile:
        stage = stage_of(progress, "Profile of the base")
        weights = profile_for(base_checkpoint, base_fingerprint, calibration, profile, stage)
    facts = facts_of(base_checkpoint.architecture, weights)
    parts = encode_parts(chosen, settings, base_checkpoint, fine_tune, facts, stage_of(progress, "Compress"))
    needed = weights if is_weighted(parts) else None
    warnings = () if parts else (f"{fine_tune.folder.name} equals the base, so the artifact holds no delta",)
    file = ArtifactFile(out, base_checkpoint, fine_tune, base_fingerprint, needed, chosen, settings, warnings)
    if chosen.tune:
        with file.draft(parts) as draft:
            stage = stage_of(progress, "Tune")
            parts = divided(parts, chosen.tune(base_checkpoint, fine_tune, draft, tuned_on, settings, stage))
    quality = None
    if held_out is not None:
        with file.draft(parts) as draft:
            quality = measure(base_checkpoint, fine_tune, draft, needed, held_out, stage_of(progress, "Evaluate"))
    digest = file.write(out, parts, None if quality is None else asdict(quality))
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
    )


@dataclass(frozen=True, slots=True, eq=False)
class ArtifactFile:
    """Everything about an artifact that is to be written to ``out`` but its parts and their quality.

    ``q`` is what a search divided survivors by, beside their probability.
    """

    out: Path
    base: Checkpoint
    fine_tune: FineTune
    base_fingerprint: str
    profile: Profile | None
    method: Method
    options: Options
    warnings: tuple[str, ...]
    q: float = 1.0

    def write(self, path: Path, parts: Parts, quality: dict[str, JsonValue] | None) -> str:
        """Returns the digest."""
        return write_artifact(
            path,
            base=self.base_fingerprint,
            tied_head=self.fine_tune.tied_head,
            parts=parts,
            profile=self.profile.digest if self.profile else None,
            provenance=self._provenance(),
            quality=quality,
            files=differing_files(self.base.folder, self.fine_tune.folder)
            | config_file(self.base.architecture, self.fine_tune.architecture),
        )

    @contextmanager
    def draft(self, parts: Parts) -> Iterator[Artifact]:
        """The artifact as far as it is known, in a file beside ``out`` that is gone afterwards."""
        path = self.out.with_name(f".{self.out.name}.{os.getpid()}.draft")
        try:
            self.write(path, parts, None)
            yield open_artifact(path)
        finally:
            path.unlink(missing_ok=True)

    def _provenance(self) -> dict[str, JsonValue]:
        """How the artifact came to be; no times and no paths, so that the same work gives the same file."""
        return {
            "method": self.method.name,
            "options": {name: getattr(self.options, name) for name in self.method.defaults},
            **({} if self.q == 1 else {"q": self.q}),
            "base": self.base.folder.name,
            "fine_tuned": self.fine_tune.folder.name,
            "dtype": str(self.fine_tune.dtype).removeprefix("torch."),
            "parameters": self.fine_tune.parameters,
            "warnings": list(self.warnings),
            "deltaserve": deltaserve_version(),
        }


def method_for(name: str | None, fine_tuned: str | Path) -> Method:
    """The method of this name, or the default for this kind of fine-tune."""
    return method_named(name or ("lora" if is_adapter(fine_tuned) else "weighted"))


def check_output(out: Path) -> None:
    """Raise OptionError where no file can be written."""
    if out.is_dir():
        raise OptionError(f"{out} is a folder; name the artifact's file")
    if not out.absolute().parent.is_dir():
        raise OptionError(f"The folder {out.absolute().parent} does not exist; make it first")


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


def _evaluation_samples(path: Path, base: Checkpoint, fine_tune: FineTune) -> list[Sample]:
    tokenizer = tokenizer_of(fine_tune.folder, base.folder)
    if tokenizer is None:
        raise OptionError("Neither base nor fine-tune has a tokenizer, so no text can be evaluated")
    samples = read_samples(path, tokenizer, EVALUATION_TOKENS)
    check_answers(path, samples, fine_tune)
    return samples


def _tuning_samples(settings: Options, text: Path | None, base: Checkpoint, fine_tune: FineTune) -> list[Sample]:
    if settings.judge == "labels" and base.architecture.head is None:
        raise OptionError(f"{base.architecture.name} predicts no tokens, so labels cannot judge it; judge by output")
    return calibration_samples(base, text, TUNING_TOKENS, fine_tune.folder, base.folder)


def facts_of(architecture: Architecture, profile: Profile | None) -> BaseFacts:
    """What methods know of this base."""
    config = architecture.config.get_text_config(decoder=True)
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    whole_heads = width // heads if heads and width else None
    return BaseFacts(profile, embedding_names(architecture), getattr(config, "head_dim", None) or whole_heads)


def encode_parts(
    chosen: Method, settings: Options, base: Checkpoint, fine_tune: FineTune, facts: BaseFacts, progress: Count
) -> Parts:
    """What stands for the fine-tune under a method, one tensor of it in memory at a time."""
    return list(_encode(chosen, settings, base, fine_tune, facts, progress))


def _encode(
    chosen: Method, settings: Options, base: Checkpoint, fine_tune: FineTune, facts: BaseFacts, progress: Count
) -> Iterator[tuple[str, Spec, Stored]]:
    for done, change in enumerate(fine_tune.changes()):
        progress(done, fine_tune.tensor_count)
        if change.is_whole:
            yield change.name, *_whole(change)
            continue
        _check_shape(change.name, base.shape(base.held_as(change.name)))
        for spec, part in chosen.function(change, settings, facts):
            yield change.name, spec, part
        give_back()


def _whole(change: Change) -> Encoded:
    """All of a tensor that the base lacks, exactly."""
    values = change.read().fine
    _check_shape(change.name, tuple(values.shape))
    return dense(values, exact_codec(values))


def _check_shape(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) not in (1, 2):
        raise UnsupportedCheckpoint(
            f"{name} has shape {list(shape)}; only matrices and vectors can be stored, "
            "so a fine-tune must leave it as it is"
        )


def is_weighted(parts: Parts) -> bool:
    """Whether serving these parts needs the profile."""
    return any(isinstance(spec, SparseSpec) and spec.mask == "weighted" for _, spec, _ in parts)


def divisors(parts: Parts) -> tuple[float, float] | None:
    """The least and the largest q."""
    found = [spec.divisor for _, spec, _ in parts if isinstance(spec, SparseSpec | FactorsSpec)]
    return (min(found), max(found)) if found else None


def deltaserve_version() -> str:
    """Of the installed package."""
    try:
        return version("deltaserve")
    except PackageNotFoundError:
        return "from source"


def stage_of(progress: Progress, name: str) -> Count:
    """The progress of one stage."""
    return lambda done, total: progress(name, done, total)
