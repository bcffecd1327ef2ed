"""The DAREx paper's comparison on our fine-tunes: ``python benchmarks/paper_table.py FOLDER``.

FOLDER holds the fine-tunes of ``evidence.CORPUS`` (deploy/demo/train.py makes them). Everything is as in the paper:
each value of a linear weight is dropped by itself (V = 1), survivors are not quantised, embeddings and norms are exact.
q is found on calibration text by the search of ``darex.py``; all are judged on held-out text.
``scripture-adamr`` was trained with AdamR, so DARE on it is DAREx-L2. Magnitude and Wanda are also measured with the
scale that makes them unbiased. Writes results/paper_table.jsonl, row by row; an interrupted run goes on where it
stopped.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from pathlib import Path

import torch
from evidence import CORPUS, Row, Rows, Subject
from torch import Tensor
from tqdm import tqdm

from deltaserve.delta_store.pruning.darex import minimise, multiples, noise_and_signal, shares, smallest
from deltaserve.delta_store.running.weights import of_fine_tune
from deltaserve.delta_store.running.whole import Whole
from deltaserve.delta_store.selection.journal import Point

RATES = (0.99, 0.95, 0.9)
SEEDS = (0, 1, 2)
HELD_OUT_TOKENS = 512
CALIBRATION_TOKENS = 256
SCOPES = ("model", "layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variants", nargs="+", default=list(CORPUS), choices=list(CORPUS))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, choices=RATES)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = Rows("paper_table", "python benchmarks/paper_table.py FOLDER")
    for name in args.variants:
        subject = Subject(name, args.folder, HELD_OUT_TOKENS, CALIBRATION_TOKENS)
        rows.once({"row": "fine-tune", "variant": name}, subject.about)
        kinds = (plain, *(partial(searched, per=per) for per in SCOPES))
        for key, measure in tqdm([s for kind in kinds for p in args.rates for s in kind(subject, p)], desc=name):
            rows.once({"row": "setting", "variant": name, **key}, measure)
    rows.end([])


Settings = Iterator[tuple[Row, Callable[[], Row]]]


def plain(subject: Subject, p: float) -> Settings:
    """What is measured with nothing to search, by its key."""
    for seed in SEEDS:
        yield {"method": "DARE", "p": p, "seed": seed}, partial(dare, subject, p, seed)
    for strength, name in ((unweighted, "magnitude"), (input_strength, "Wanda")):
        for unbiased in (False, True):
            key = {"method": name, "p": p, "unbiased": unbiased}
            yield key, partial(importance, subject, p, strength, unbiased)


def searched(subject: Subject, p: float, per: str) -> Settings:
    for judge in ("output", "labels"):
        key = {"method": "DAREx-q", "p": p, "seed": 0, "per": per, "judge": judge}
        yield key, partial(darex, subject, p, per, judge)


def dare(subject: Subject, p: float, seed: int) -> Row:
    """A fair coin for each value; survivors / (1 - p)."""
    kept = survivors(subject, p, seed)
    return subject.measure_tensors(subject.variant(lambda name: kept[name] / (1 - p)))


def survivors(subject: Subject, p: float, seed: int) -> dict[str, Tensor]:
    """The deltas with zeros where values are dropped, by weight."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: subject.delta(name) * (torch.rand(subject.fine[name].shape, generator=generator) >= p)
        for name in subject.linears
    }


Tensors = Iterator[tuple[str, Tensor]]
Strength = Callable[[Subject, str], Tensor | float]


def unweighted(subject: Subject, name: str) -> float:
    return 1.0


def input_strength(subject: Subject, name: str) -> Tensor:
    """``[in]``: RMS of the inputs, from the base's profile."""
    return subject.profile.weights(name).float()


def importance(subject: Subject, p: float, strength: Strength, unbiased: bool) -> Row:
    """What is largest stays: of the whole weight by magnitude, of each row (as Wanda does) where inputs count."""

    def decode(name: str) -> Tensor:
        delta, by = subject.delta(name), strength(subject, name)
        scores = (delta * by).abs()
        flat = scores.view(1, -1) if isinstance(by, float) else scores
        threshold = flat.kthvalue(max(1, round(p * flat.shape[1])), dim=1, keepdim=True).values
        kept = delta * (scores > threshold)
        if not unbiased:
            return kept
        weighted = kept * by  # the scale with which outputs of independent inputs are unbiased
        return kept * ((delta * by).square().sum() / weighted.square().sum())

    return subject.measure_tensors(subject.variant(decode))


def darex(subject: Subject, p: float, per: str, judge: str) -> Row:
    """DARE of seed 0 with the q that calibration text finds best; and that q as a multiple of 1 - p."""
    points, rho = trials(subject, p, per)
    least = smallest(rho, p)
    eta = minimise(lambda eta: points(eta).kl if judge == "output" else points(eta).loss, least)
    by = multiples(rho, eta, p)
    tensors = divided(subject, survivors(subject, p, 0), p, by)
    return subject.measure_tensors(tensors) | {"q": [min(by.values()), max(by.values())]}


@lru_cache(maxsize=1)
def trials(subject: Subject, p: float, per: str) -> tuple[Callable[[float], Point], dict[str, float]]:
    """What calibration text says of an eta, each looked at once for both judges; and rho by weight."""
    kept, rho = survivors(subject, p, 0), shares(noise_and_signal_of(subject), per)

    @cache
    def point(eta: float) -> Point:
        tensors = divided(subject, kept, p, multiples(rho, eta, p))
        return subject.bench.measure_tensors(tensors, 0, subject.calibration)

    return point, rho


def divided(subject: Subject, kept: dict[str, Tensor], p: float, by: dict[str, float]) -> Tensors:
    return subject.variant(lambda name: kept[name] / ((1 - p) * by[name]))


@lru_cache(maxsize=1)
def noise_and_signal_of(subject: Subject) -> dict[str, tuple[float, float]]:
    with torch.inference_mode():
        run = partial(Whole().run, of_fine_tune(subject.fine_tune))
        return noise_and_signal(run, subject.base, subject.linears, subject.calibration[0])


if __name__ == "__main__":
    main()
