"""The texts of a search: a short one for the survey, calibration text, and held-out text for the last word."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaserve.delta_store.calibration import BUILT_IN, calibration_samples
from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.fine_tune import FineTune
from deltaserve.delta_store.selection.search import CALIBRATION, HELD_OUT, SHORT
from deltaserve.delta_store.text import Sample

SCORED = {CALIBRATION: 1024, HELD_OUT: 2048}
"""Tokens that are predicted, at most."""

RUN = {CALIBRATION: 4096, HELD_OUT: 8192}
"""Tokens that are read, at most: answers may be far shorter than their prompts. Twice that for tasks."""

SHORT_SHARE = 0.25
HELD_OUT_EVERY = 3


@dataclass(frozen=True, slots=True)
class Files:
    """What the user gave: text to search on and text to confirm on. ``is_task``: prompts whose answers are scored."""

    calibration: Path | None
    held_out: Path | None
    is_task: bool = False

    @property
    def confirmed_on(self) -> str:
        """What the held-out text is, in words."""
        if self.held_out is not None:
            return self.held_out.name
        return f"a third of {BUILT_IN if self.calibration is None else self.calibration.name}"


def read_texts(files: Files, base: Checkpoint, fine_tune: FineTune) -> dict[str, Sequence[Sample]]:
    """The samples of each text by its name. Without a file for it, every third sample of the calibration is held out.

    Raises OptionError for text that cannot be used or is too little.
    """
    if files.is_task and files.calibration and files.calibration.suffix != ".jsonl":
        raise OptionError(f"{files.calibration} is no .jsonl file; a task is one line of JSON each: prompt and answer")
    if files.held_out and files.calibration is None:
        raise OptionError("Text to confirm on was given but none to search on: give calibration text too")
    folders = (fine_tune.folder, base.folder)
    limit = sum(SCORED.values())
    samples = calibration_samples(base, files.calibration, limit, *folders)
    if files.held_out is None:
        held_out = samples[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        samples = [sample for i, sample in enumerate(samples, 1) if i % HELD_OUT_EVERY]
    else:
        held_out = calibration_samples(base, files.held_out, limit, *folders)
    budget = 2 if files.is_task else 1
    calibration = _first(samples, SCORED[CALIBRATION], budget * RUN[CALIBRATION])
    texts = {
        SHORT: _first(calibration, _scored(calibration) * SHORT_SHARE, budget * RUN[CALIBRATION] * SHORT_SHARE),
        CALIBRATION: calibration,
        HELD_OUT: _first(held_out, SCORED[HELD_OUT], budget * RUN[HELD_OUT]),
    }
    if not texts[HELD_OUT]:
        raise OptionError(f"{files.calibration} holds {len(samples)} samples; to hold some out, a search needs three")
    return texts


def _scored(samples: Sequence[Sample]) -> int:
    return sum(len(sample.ids) - sample.start for sample in samples)


def _first(samples: Sequence[Sample], scored: float, run: float) -> Sequence[Sample]:
    """As many from the front as stay within both numbers of tokens, and at least one."""
    for count in range(len(samples), 1, -1):
        front = samples[:count]
        if _scored(front) <= scored and sum(len(sample.ids) for sample in front) <= run:
            return front
    return samples[:1]
