"""The bench: one model in memory, into whose weights one candidate after the other is written and measured."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.codec.artifact import Artifact
from deltaserve.delta_store.fine_tune import FineTune
from deltaserve.delta_store.merge import variant_tensors
from deltaserve.delta_store.plain_model import plain_model, variant_config
from deltaserve.delta_store.profile import Profile
from deltaserve.delta_store.quality import compare, outputs, quality_of, targets
from deltaserve.delta_store.selection.journal import Point
from deltaserve.delta_store.text import Sample


class Bench:
    """Base and fine-tune, of which the latter's predictions on each sample are computed once and kept.

    Takes the memory of one model in float32, and 4 bytes for each scored token and word of the vocabulary. The model is
    only loaded when something is measured. Each artifact's tensors overwrite all of the last one's, so nothing adds up.
    """

    def __init__(self, base: Checkpoint, fine_tune: FineTune) -> None:
        self._base = base
        self._fine_tune = fine_tune
        self._model: Any = None
        self._wanted: dict[Sample, Tensor] = {}

    def measure(self, artifact: Artifact, profile: Profile | None, samples: Sequence[Sample]) -> Point:
        """The variant that an artifact's file makes of the base."""
        tensors = variant_tensors(self._base, artifact, profile, torch.float32)
        return self.measure_tensors(tensors, artifact.path.stat().st_size, samples)

    def measure_tensors(
        self, tensors: Iterable[tuple[str, Tensor]], size_bytes: int, samples: Sequence[Sample]
    ) -> Point:
        """A variant given by all of its parameters, that takes ``size_bytes``."""
        self._remember(samples)
        self._load(tensors)
        return self._point(samples, size_bytes)

    def base(self, samples: Sequence[Sample]) -> Point | None:
        """The bare base; None where the fine-tune has tokens that the base lacks."""
        if self._fine_tune.vocabulary != self._base.shape(self._base.architecture.embedding)[0]:
            return None
        self._remember(samples)
        names = self._parameters()
        self._load((name, self._base.read(self._base.held_as(name))) for name in names)
        return self._point(samples, 0)

    @torch.inference_mode()
    def _point(self, samples: Sequence[Sample], size: int) -> Point:
        rows, exact, exact_fine_tuned = [], 0, 0
        for sample in samples:
            given, wanted, ids = outputs(self._model, sample), self._wanted[sample], targets(sample)
            rows.append(compare(wanted, given, ids))
            exact += torch.equal(given.argmax(1), ids)
            exact_fine_tuned += torch.equal(wanted.argmax(1), ids)
        quality = quality_of(torch.cat(rows, 1), None)
        return Point(
            bytes=size,
            tokens=quality.tokens,
            kl=quality.kl_mean,
            kl_p99=quality.kl_p99,
            agreement=quality.top1_agreement,
            loss=quality.loss_artifact,
            loss_fine_tuned=quality.loss_fine_tuned,
            score=exact / len(samples),
            score_fine_tuned=exact_fine_tuned / len(samples),
        )

    @torch.inference_mode()
    def _remember(self, samples: Sequence[Sample]) -> None:
        """Have the full fine-tune's predictions of these samples; earlier texts' are kept, of the same samples once."""
        if new := [sample for sample in samples if sample not in self._wanted]:
            self._load(self._full())
            self._wanted |= {sample: outputs(self._model, sample) for sample in new}

    def _full(self) -> Iterator[tuple[str, Tensor]]:
        """The fine-tune, with a head of its own where variants have one."""
        head, embedding = self._base.architecture.head, self._base.architecture.embedding
        for name, tensor in self._fine_tune.tensors():
            yield name, tensor
            if name == embedding and head and self._fine_tune.tied and not self._fine_tune.tied_head:
                yield head, tensor

    @torch.inference_mode()
    def _load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        if self._model is None:
            architecture = self._base.architecture
            config = variant_config(architecture, self._fine_tune.vocabulary, self._fine_tune.tied_head, torch.float32)
            self._model = plain_model(architecture, config, tensors, torch.float32)
            return
        parameters = self._parameters()
        for name, tensor in tensors:
            parameters[name].copy_(tensor)

    def _parameters(self) -> dict[str, Tensor]:
        """By name, and what a checkpoint may hold beside them."""
        return dict(self._model.state_dict())
