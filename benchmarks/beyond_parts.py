"""Ideas that change how weighted drop is encoded: budgets and seeds."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from math import sqrt

from evidence import Row, Subject
from torch import Tensor

from deltaserve.delta_store.artifact_file import Parts
from deltaserve.delta_store.encoding import facts_of
from deltaserve.delta_store.fine_tune import Change
from deltaserve.delta_store.pruning import whole
from deltaserve.delta_store.pruning.methods import METHODS
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.pruning.random_drop import weighted
from deltaserve.delta_store.pruning.weights import Weight
from deltaserve.kernels.parts import Delta
from deltaserve.kernels.reference import unpack

WEIGHTED = METHODS["weighted"]
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEPTHS = 3
"""Groups of layers, by depth."""

SEEDS_TRIED = 4

Drop = Callable[[str], float]
Seed = Callable[[Weight, Options], int]


def parts(subject: Subject, drop: Drop, seed: Seed = lambda weight, options: 0) -> Parts:
    """Weighted drop with a p and a seed for each weight."""
    facts = facts_of(subject.base.architecture, subject.profile)
    found: Parts = []
    for change in subject.fine_tune.changes():
        if change.name in subject.embeddings:
            found += embedding_parts(subject, change)
            continue
        weight = Weight(change.name, whole.difference(change.read()), change.transposed)
        if weight.matrix.dim() == 1:
            found.append((change.name, *weight.whole(WEIGHTED.options({}))))
        else:
            options = WEIGHTED.options({"drop": drop(change.name)})
            options = replace(options, seed=seed(weight, options))
            found += [(change.name, *encoded) for encoded in weighted(weight, options, facts)]
    return found


@lru_cache(maxsize=1)
def embedding_parts(subject: Subject, change: Change) -> Parts:
    """Those of an embedding, which is the same for all."""
    options = WEIGHTED.options({})
    encoded = whole.embedding(change.read(), options.rank, options.embedding_codec)
    return [(change.name, *part) for part in encoded]


def measured(subject: Subject, found: Parts) -> Row:
    with subject.artifact_of(found, WEIGHTED, WEIGHTED.options({})) as (artifact, profile):
        return subject.row(subject.bench.measure(artifact, profile, subject.held_out))


def calibration_kl(subject: Subject, found: Parts) -> float:
    with subject.artifact_of(found, WEIGHTED, WEIGHTED.options({})) as (artifact, profile):
        return subject.bench.measure(artifact, profile, subject.calibration).kl


def water_filled(subject: Subject, drop: float) -> Row:
    """As many survivors, dealt to weights by measured sensitivity.

    The error of a weight is about its sensitivity over its density, so their sum is least where a weight's density is
    as the root of its sensitivity a number. Sensitivity is that of its kind times that of its depth.
    """
    by = sensitivities(subject)
    numbers = {name: subject.fine[name].numel() for name in subject.linears}
    wanted = {name: sqrt(by[name] / numbers[name]) for name in subject.linears}
    scale = (1 - drop) * sum(numbers.values()) / sum(wanted[name] * numbers[name] for name in numbers)
    return measured(subject, parts(subject, lambda name: 1 - min(1.0, max(0.002, scale * wanted[name]))))


@lru_cache(maxsize=1)
def sensitivities(subject: Subject) -> dict[str, float]:
    """By weight: the KL on calibration text of pruning its kind alone, times that of its depth, a share of each."""

    def kl_of(some: list[str]) -> float:
        return calibration_kl_of(subject, dict.fromkeys(some, 0.98))

    kinds = {kind: [name for name in subject.linears if kind in name] for kind in KINDS}
    depths = {depth: [name for name in subject.linears if depth_of(subject, name) == depth] for depth in range(DEPTHS)}
    by_kind = {kind: kl_of(some) for kind, some in kinds.items()}
    by_depth = {depth: kl_of(some) for depth, some in depths.items()}
    print(subject.name, by_kind, by_depth, flush=True)
    return {
        name: by_kind[kind] / len(some) * by_depth[depth_of(subject, name)]
        for kind, some in kinds.items()
        for name in some
    }


def calibration_kl_of(subject: Subject, drops: Mapping[str, float]) -> float:
    """Where only some weights are pruned, and all else is exact."""
    facts = facts_of(subject.base.architecture, subject.profile)

    def decode(name: str) -> Tensor:
        delta = subject.delta(name)
        if name not in drops:
            return delta
        ((spec, part),) = weighted(Weight(name, delta), WEIGHTED.options({"drop": drops[name]}), facts)
        return unpack(Delta(spec.shape, (part,)))

    return subject.bench.measure_tensors(subject.variant(decode), 0, subject.calibration).kl


def depth_of(subject: Subject, name: str) -> int:
    layers = subject.base.architecture.config.num_hidden_layers
    return int(name.split(".")[2]) * DEPTHS // layers


def best_seed_of_model(subject: Subject, drop: float) -> Row:
    """Of a few seeds the one whose predictions on calibration text are nearest."""
    drawn = [parts(subject, lambda name: drop, lambda w, o, seed=seed: seed) for seed in range(SEEDS_TRIED)]
    kl = [calibration_kl(subject, found) for found in drawn]
    return measured(subject, drawn[kl.index(min(kl))]) | {"calibration_kl": kl}


def best_seed_of_weight(subject: Subject, drop: float) -> Row:
    """For each weight the seed of least error in its outputs, inputs taken as independent."""
    facts = facts_of(subject.base.architecture, subject.profile)

    def best(weight: Weight, options: Options) -> int:
        strength = weight.input_strength(facts)

        def error(seed: int) -> float:
            ((spec, part),) = weighted(weight, replace(options, seed=seed), facts)
            difference = unpack(Delta(spec.shape, (part,))) - weight.matrix
            return (difference if strength is None else difference * strength).square().sum().item()

        return min(range(SEEDS_TRIED), key=error)

    return measured(subject, parts(subject, lambda name: drop, best))
