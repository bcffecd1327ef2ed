"""Ideas that correct what weighted drop decodes to: scales a row, a mean input's bias, scales distilled from logits."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch
from beyond_parts import WEIGHTED, parts
from evidence import Row, Subject
from torch import Tensor

from deltaserve.delta_store.encoding import facts_of
from deltaserve.delta_store.merge import variant_tensors
from deltaserve.delta_store.pruning.layer_inputs import look_at_inputs
from deltaserve.delta_store.pruning.weights import Weight
from deltaserve.delta_store.quality import outputs
from deltaserve.delta_store.running.weights import of_fine_tune
from deltaserve.delta_store.running.whole import Whole

STEPS, RATE = 16, 0.02
"""Of the distillation of scales."""

Decoded = tuple[dict[str, Tensor], int]


@lru_cache(maxsize=2)
def plain(subject: Subject, drop: float) -> Decoded:
    """The variant under weighted drop, by parameter, and its file's bytes."""
    with subject.artifact_of(parts(subject, lambda name: drop), WEIGHTED, WEIGHTED.options({})) as (artifact, profile):
        tensors = dict(variant_tensors(subject.base, artifact, profile, torch.float32))
        return tensors, artifact.path.stat().st_size


def corrected(subject: Subject, drop: float, correct: Callable[[str, Tensor], Tensor], extra: int) -> Row:
    """The plain variant with each weight's decoded delta corrected, in so many bytes more."""
    tensors, size = plain(subject, drop)
    changed = (
        (name, subject.weights[name] + correct(name, t - subject.weights[name]) if name in subject.linears else t)
        for name, t in tensors.items()
    )
    return subject.measure_tensors(changed, size + extra)


def row_scales(subject: Subject, drop: float) -> Row:
    """A 16-bit scale a row that gives it the projection on its delta back, inputs counted by their strength."""
    facts = facts_of(subject.base.architecture, subject.profile)

    def correct(name: str, decoded: Tensor) -> Tensor:
        delta = subject.delta(name)
        strength = Weight(name, delta).input_strength(facts)
        assert strength is not None
        weight = strength.square()
        scale = (delta.square() @ weight) / ((decoded * delta) @ weight).clamp_min(1e-20)
        return decoded * scale.clamp(0.5, 2)[:, None]

    return corrected(subject, drop, correct, 2 * sum(len(subject.fine[name]) for name in subject.linears))


def bias(subject: Subject, drop: float) -> Row:
    """What the mean input loses in each output, given back by a rank of one in int8: (delta - decoded) m m^T / m^2."""
    means = mean_inputs(subject)

    def correct(name: str, decoded: Tensor) -> Tensor:
        mean = means[name]
        return decoded + torch.outer((subject.delta(name) - decoded) @ mean, mean / mean.square().sum())

    return corrected(subject, drop, correct, sum(sum(subject.fine[name].shape) for name in subject.linears))


@lru_cache(maxsize=1)
def mean_inputs(subject: Subject) -> dict[str, Tensor]:
    """``[in]`` by weight, on calibration text."""
    sums: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        look_at_inputs(
            partial(Whole().run, of_fine_tune(subject.fine_tune)),
            subject.base,
            subject.linears,
            subject.calibration,
            lambda name, x, delta: sums.setdefault(name, []).append(x),
        )
    return {name: torch.cat(inputs).mean(0) for name, inputs in sums.items()}


def distilled(subject: Subject, drop: float) -> Row:
    """One factor a weight (it goes into scales that are there), trained on the KL to the full fine-tune."""
    tensors, _ = plain(subject, drop)
    with torch.inference_mode():
        wanted = Whole().run(of_fine_tune(subject.fine_tune), subject.calibration, outputs)
    model = of_fine_tune(replace(subject.fine_tune, read=tensors.__getitem__)).model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in subject.linears)
    parameters = {name: p for name, p in model.named_parameters() if name in subject.linears}
    decoded = {name: tensors[name] - subject.weights[name] for name in parameters}
    scales = torch.ones(len(parameters), requires_grad=True)
    optimizer = torch.optim.Adam([scales], lr=RATE, betas=(0.8, 0.95))
    for step in range(STEPS):
        at = step % len(wanted)
        given = outputs(model, subject.calibration[at])
        (wanted[at].clone().exp() * (wanted[at].clone() - given)).sum(1).mean().backward()
        scales.grad = torch.stack([(p.grad * decoded[name]).sum() for name, p in parameters.items()])
        optimizer.step()
        with torch.no_grad():
            for (name, p), scale in zip(parameters.items(), scales, strict=True):
                p.copy_(subject.weights[name] + scale * decoded[name])
                p.grad = None
    by = dict(zip(parameters, scales.tolist(), strict=True))
    del model
    row = corrected(subject, drop, lambda name, decoded: decoded * by[name], 0)
    return row | {"scales": [min(by.values()), statistics.median(by.values()), max(by.values())]}
