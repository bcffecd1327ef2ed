"""A scale that makes a pruned weight's outputs unbiased on text: ``<decoded x, delta x> = <delta x, delta x>``."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.codec.artifact import Artifact
from deltaserve.delta_store.fine_tune import FineTune
from deltaserve.delta_store.pruning.layer_inputs import look_at_inputs
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.pruning.tuning import pruned_part, survivors
from deltaserve.delta_store.running.memory import Runner
from deltaserve.delta_store.running.weights import of_fine_tune
from deltaserve.delta_store.text import Sample


@torch.inference_mode()
def unbiased_outputs(
    base: Checkpoint,
    fine_tune: FineTune,
    artifact: Artifact,
    samples: Sequence[Sample],
    options: Options,
    runner: Runner,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """For each pruned weight ``<decoded x, delta x> / <delta x, delta x>``, by which its survivors are to be divided.

    ``x`` are the layer's inputs in the full fine-tune, which ``runner`` runs. A weight that the text does not reach
    gets 1.
    """
    sums = dict.fromkeys(survivors(artifact), (0.0, 0.0))

    def look(name: str, x: Tensor, delta: Tensor) -> None:
        wanted, given = x @ delta, x @ pruned_part(artifact, name).T
        got, full = sums[name]
        sums[name] = got + (given * wanted).sum().item(), full + wanted.square().sum().item()

    progress(0, 1)
    look_at_inputs(partial(runner.run, of_fine_tune(fine_tune)), base, sums.keys(), samples, look)
    return {name: got / full if got > 0 and full > 0 else 1.0 for name, (got, full) in sums.items()}
