"""The q of DAREx-q: by what survivors are divided, searched with the pruned model itself.

Dividing by 1 - p is unbiased, but the noise of a large delta may cost more than a bias would; dividing by a larger q
shrinks both. For a layer whose output is a sum of terms c (a delta times its input, S = sum c, Q = sum c**2), the
squared error of that layer's output is least at ``q = (1 - p) + p * rho``, ``rho = sum Q / sum S**2``. But shrinkage
adds up over layers, so this is only where the search starts: it tries ``q = (1 - p) + eta * p * rho`` for one number
eta of the whole model, and the model's predictions judge. rho is the whole model's (one q) or each layer's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.codec.artifact import Artifact
from deltaserve.delta_store.fine_tune import FineTune
from deltaserve.delta_store.pruning.layer_inputs import look_at_inputs
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.pruning.tuning import pruned_part, survivors
from deltaserve.delta_store.quality import loss, output_change, outputs
from deltaserve.delta_store.running.memory import Runner
from deltaserve.delta_store.running.weights import ModelWeights, of_artifact, of_fine_tune
from deltaserve.delta_store.text import Sample

COARSE, FINE = 4.0, (2.0, 2**0.5, 2**0.25)
LEAST_CHANGE = 0.03
EXPECTED_TRIALS = 14


@torch.inference_mode()
def search(
    base: Checkpoint,
    fine_tune: FineTune,
    artifact: Artifact,
    samples: Sequence[Sample],
    options: Options,
    runner: Runner,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """For each pruned weight of ``artifact`` (made with q = 1 - p) the best q as a multiple of 1 - p: 1 or more.

    Judged on ``samples``: by the loss of their scored tokens (``labels``), or by how far outputs are from the full
    fine-tune's (``output``). Takes what ``runner`` does, and twice the outputs.
    """
    names = survivors(artifact)
    if options.drop == 0:
        return dict.fromkeys(names, 1.0)
    run_full = partial(runner.run, of_fine_tune(fine_tune))
    rho = shares(noise_and_signal(run_full, base, names, samples[0]), options.per)
    wanted = run_full(samples, outputs) if options.judge == "output" else []
    pruned = of_artifact(base, artifact, None)
    of_states = fine_tune.architecture.head is None and samples[0].label is None
    trials = 0

    def score(eta: float) -> float:
        nonlocal trials
        progress(min(trials, EXPECTED_TRIALS - 1), EXPECTED_TRIALS)
        trials += 1
        divided = divided_weights(pruned, artifact, multiples(rho, eta, options.drop))
        given = runner.run(divided, samples, outputs)
        if options.judge == "labels":
            return loss(given, samples)
        return output_change(given, wanted, of_states=of_states)

    return multiples(rho, minimise(score, smallest(rho, options.drop)), options.drop)


def divided_weights(pruned: ModelWeights, artifact: Artifact, by: Mapping[str, float]) -> ModelWeights:
    """The model of ``artifact``, its survivors divided anew: by these multiples of what they were divided by."""

    def stored(name: str) -> Tensor:
        weight = pruned.stored(name)
        if by.get(name, 1.0) == 1.0:
            return weight
        matrix = pruned_part(artifact, name)
        return weight.add_(matrix.T if artifact.specs(name)[0].transposed else matrix, alpha=1 / by[name] - 1)

    return replace(pruned, stored=stored)


def shares(sums: Mapping[str, tuple[float, float]], per: str) -> dict[str, float]:
    """rho by weight, from (sum Q, sum S**2) by weight: its own, or that of the whole model."""
    noise, signal = sum(q for q, _ in sums.values()), sum(s for _, s in sums.values())
    whole = noise / signal if signal else 0.0
    return {name: (q / s if s else 0.0) if per == "layer" else whole for name, (q, s) in sums.items()}


def multiples(rho: Mapping[str, float], eta: float, drop: float) -> dict[str, float]:
    """q / (1 - p) by weight; q is at most 1."""
    kept = 1 - drop
    return {name: min(1 / kept, 1 + eta * drop / kept * share) for name, share in rho.items()}


def minimise(score: Callable[[float], float], smallest: float) -> float:
    """The number of 0 or more with about the least ``score``: a coarse grid, then finer around its best.

    The grid goes from 1 by factors of four down to ``smallest``, where there is no more to see, and up while that is
    better.
    """
    grid = [0.0, 1.0]
    while grid[-1] > smallest:
        grid.append(grid[-1] / COARSE)
    scores = {eta: score(eta) for eta in grid}
    largest = 1.0
    while _best(scores) == largest:
        largest *= COARSE
        scores[largest] = score(largest)
    for factor in FINE:
        best = _best(scores)
        if best > 0:
            scores |= {eta: score(eta) for eta in (best * factor, best / factor)}
    return _best(scores)


def _best(scores: Mapping[float, float]) -> float:
    return min(scores, key=scores.__getitem__)


def smallest(rho: Mapping[str, float], drop: float) -> float:
    """The eta with which no q is further than ``LEAST_CHANGE`` from 1 - p; infinite where none ever is."""
    steepest = max(rho.values(), default=0.0) * drop / (1 - drop)
    return LEAST_CHANGE / steepest if steepest else inf


def noise_and_signal(
    run: Callable[..., Any], base: Checkpoint, names: Sequence[str], sample: Sample
) -> dict[str, tuple[float, float]]:
    """By weight (sum Q, sum S**2) over the sample's tokens and the weight's rows; of a layer not reached, zeros.

    ``run`` is a runner's, of the full fine-tune.
    """
    sums = dict.fromkeys(names, (0.0, 0.0))

    def look(name: str, x: Tensor, delta: Tensor) -> None:
        noise = (x.square().sum(0) @ delta.square().sum(1)).item()
        sums[name] = (noise, (x @ delta).square().sum().item())

    look_at_inputs(run, base, names, [sample], look)
    return sums
