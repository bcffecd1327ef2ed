"""The bench: one candidate after the other is run and measured beside the fine-tune."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.codec.artifact import Artifact
from deltaserve.delta_store.fine_tune import FineTune
from deltaserve.delta_store.profile import Profile
from deltaserve.delta_store.quality import compare, outputs, quality_of, targets
from deltaserve.delta_store.running.memory import Runner
from deltaserve.delta_store.running.weights import ModelWeights, of_artifact, of_base, of_fine_tune
from deltaserve.delta_store.running.whole import Whole
from deltaserve.delta_store.selection.journal import Point
from deltaserve.delta_store.text import Sample


class Bench:
    """Base and fine-tune, of which the latter's predictions on each sample are computed once and kept.

    Takes what ``runner`` does (by default one model in float32), and 4 bytes for each scored token and word of the
    vocabulary. Nothing is loaded before something is measured.
    """

    def __init__(self, base: Checkpoint, fine_tune: FineTune, runner: Runner | None = None) -> None:
        self._base = base
        self._fine_tune = fine_tune
        self.runner = runner or Whole()
        self._wanted: dict[Sample, Tensor] = {}

    def measure(self, artifact: Artifact, profile: Profile | None, samples: Sequence[Sample]) -> Point:
        """The variant that an artifact's file makes of the base."""
        weights = of_artifact(self._base, artifact, profile)
        return self._point(weights, artifact.path.stat().st_size, samples)

    def measure_tensors(
        self, tensors: Iterable[tuple[str, Tensor]], size_bytes: int, samples: Sequence[Sample]
    ) -> Point:
        """A variant given by all of its parameters, that takes ``size_bytes``."""
        held = dict(tensors)
        weights = replace(of_fine_tune(self._fine_tune), names=tuple(held), stored=held.__getitem__)
        return self._point(weights, size_bytes, samples)

    def base(self, samples: Sequence[Sample]) -> Point | None:
        """The bare base; None where the fine-tune has tokens that the base lacks."""
        if self._fine_tune.vocabulary != self._base.shape(self._base.architecture.embedding)[0]:
            return None
        return self._point(of_base(self._base), 0, samples)

    def _point(self, weights: ModelWeights, size: int, samples: Sequence[Sample]) -> Point:
        self._remember(samples)
        found = self.runner.run(self._in_one_form(weights), samples, self._beside_wanted)
        rows, exact, exact_fine_tuned = zip(*found, strict=True)
        quality = quality_of(torch.cat(rows, 1), None)
        return Point(
            bytes=size,
            tokens=quality.tokens,
            kl=quality.kl_mean,
            kl_p99=quality.kl_p99,
            agreement=quality.top1_agreement,
            loss=quality.loss_artifact,
            loss_fine_tuned=quality.loss_fine_tuned,
            score=sum(exact) / len(samples),
            score_fine_tuned=sum(exact_fine_tuned) / len(samples),
        )

    def _beside_wanted(self, model: Any, sample: Sample) -> tuple[Tensor, bool, bool]:
        """What ``compare`` gives, and whether the text is what the model, and the fine-tune, would say."""
        given, wanted, ids = outputs(model, sample), self._wanted[sample], targets(sample)
        exact, exact_fine_tuned = (torch.equal(scores.argmax(1), ids) for scores in (given, wanted))
        return compare(wanted, given, ids), exact, exact_fine_tuned

    def _remember(self, samples: Sequence[Sample]) -> None:
        """Have the full fine-tune's predictions of these samples; earlier texts' are kept, of the same samples once."""
        if new := [sample for sample in samples if sample not in self._wanted]:
            found = self.runner.run(self._in_one_form(of_fine_tune(self._fine_tune)), new, outputs)
            self._wanted |= dict(zip(new, found, strict=True))

    def _in_one_form(self, weights: ModelWeights) -> ModelWeights:
        """The variants' own, with a head of its own where they have one, so that a whole model can stay."""
        return replace(weights, architecture=self._base.architecture, tied=self._fine_tune.tied_head)
