"""What methods may do once all is pruned: find, with the whole model, a number to divide each weight's survivors by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.codec.artifact import Artifact
from deltaserve.delta_store.codec.encode import SparseFactors
from deltaserve.delta_store.codec.parts import Stored
from deltaserve.delta_store.codec.specs import FactorsSpec, SparseSpec, Spec
from deltaserve.delta_store.fine_tune import FineTune
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.running.memory import Runner
from deltaserve.delta_store.text import Sample
from deltaserve.kernels.parts import Delta, Sparse
from deltaserve.kernels.reference import unpack

TUNING_TOKENS = 512


class Tune(Protocol):
    """From the pruned fine-tune, as an artifact, and text to the numbers, by parameter name; ``runner`` runs models."""

    def __call__(
        self,
        base: Checkpoint,
        fine_tune: FineTune,
        artifact: Artifact,
        samples: Sequence[Sample],
        options: Options,
        runner: Runner,
        progress: Callable[[int, int], None] = ...,
    ) -> dict[str, float]: ...


def survivors(artifact: Artifact) -> list[str]:
    """The parameters whose first part was pruned, and can be divided."""
    return [name for name in artifact.names if isinstance(artifact.specs(name)[0], SparseSpec | FactorsSpec)]


def pruned_part(artifact: Artifact, name: str) -> Tensor:
    """float32 ``[out, in]``: what those survivors stand for."""
    delta = artifact.delta(name)
    return unpack(Delta(delta.shape, delta.parts[:1]))


def divided(parts: Sequence[tuple[str, Spec, Stored]], by: Mapping[str, float]) -> list[tuple[str, Spec, Stored]]:
    """The parts, of which those that were dropped at random are divided by their weight's number."""
    return [(name, *_divided(spec, part, by.get(name, 1.0))) for name, spec, part in parts]


def _divided(spec: Spec, part: Stored, by: float) -> tuple[Spec, Stored]:
    match spec, part:
        case SparseSpec(), Sparse():
            return spec.model_copy(update={"divisor": spec.divisor * by}), _fainter(part, by)
        case FactorsSpec(), SparseFactors():
            return spec.model_copy(update={"divisor": spec.divisor * by}), replace(part, a=_fainter(part.a, by))
    return spec, part


def _fainter(part: Sparse, by: float) -> Sparse:
    return replace(part, factors=part.factors / by)
