"""Ideas beyond weighted drop, each against it at equal bytes: ``python benchmarks/beyond.py FOLDER``.

FOLDER holds the fine-tunes of ``evidence.CORPUS``, of which ``frontier.py`` has measured weighted drop at several
sizes: on a line through those points (logarithms) lies what an idea's bytes would otherwise buy. Ideas that keep the
draw are put beside weighted drop of the same seed, others beside the median of the seeds. ``against_weighted`` is an
idea's KL over that: below 1 it pays. Nothing but held-out text judges; what is tuned is tuned on calibration text.
Writes results/beyond.jsonl, row by row; an interrupted run goes on where it stopped.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Collection
from functools import partial
from itertools import pairwise
from math import exp, log
from pathlib import Path

import torch
from beyond_corrections import bias, distilled, row_scales
from beyond_parts import best_seed_of_model, best_seed_of_weight, water_filled
from evidence import CORPUS, HERE, Row, Rows, Subject
from frontier import SEEDS
from tqdm import tqdm

from deltaserve.delta_store.pruning.options import Value

HELD_OUT_TOKENS, CALIBRATION_TOKENS = 768, 256
DROPS = (0.98, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variants", nargs="+", default=list(CORPUS), choices=list(CORPUS))
    parser.add_argument("--ideas", nargs="+", default=list(IDEAS), choices=list(IDEAS))
    parser.add_argument("--drops", nargs="+", type=float, default=DROPS, choices=DROPS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = Rows("beyond", "python benchmarks/beyond.py FOLDER")
    for name in args.variants:
        subject = Subject(name, args.folder, HELD_OUT_TOKENS, CALIBRATION_TOKENS)
        for idea, drop in tqdm([(idea, drop) for idea in args.ideas for drop in args.drops], desc=name):
            key = {"row": "idea", "variant": name, "idea": idea, "drop": drop, "seed": 0}
            rows.once(key, partial(against_weighted, subject, idea, drop))


def against_weighted(subject: Subject, idea: str, drop: float) -> Row:
    row = IDEAS[idea](subject, drop)
    beside = weighted_kl(subject.name, row["bytes"], seeds=(0,) if idea in SAME_DRAW else SEEDS)
    return row | {"same_draw": idea in SAME_DRAW, "against_weighted": row["relative_kl"] / beside}


def weighted_kl(variant: str, size: float, seeds: Collection[int]) -> float:
    """Relative KL of weighted drop (V = 16, int2, embeddings of rank 4) in a file of so many bytes; median of seeds."""
    rows = map(json.loads, (HERE / "results" / "frontier.jsonl").read_text().splitlines())
    found: dict[int, list[float]] = {}
    for row in rows:
        setting = row.get("setting", "").removeprefix("weighted p=").removesuffix(" V=16 int2")
        if row.get("variant") == variant and row.get("seed") in seeds and setting.replace(".", "").isdigit():
            found.setdefault(row["bytes"], []).append(row["relative_kl"])
    points = sorted((log(size), log(statistics.median(kl))) for size, kl in found.items())
    near = next((pair for pair in pairwise(points) if log(size) <= pair[1][0]), points[-2:])
    (x0, y0), (x1, y1) = near
    return exp(y0 + (y1 - y0) * (log(size) - x0) / (x1 - x0))


def option(options: dict[str, Value], subject: Subject, drop: float, method: str = "weighted") -> Row:
    """What the product has already."""
    return subject.measure(method, {"drop": drop, **options})


IDEAS: dict[str, Callable[[Subject, float], Row]] = {
    "embedding of rank 1": partial(option, {"rank": 1}),
    "V = 1": partial(option, {"block": 1}),
    "one bit": partial(option, {"codec": "sign"}),
    "one direction a weight beside": partial(option, {"linear_rank": 1}, method="low-rank-residual"),
    "embedding int4": partial(option, {"embedding_codec": "int4"}),
    "norms int8": partial(option, {"whole_codec": "int8"}),
    "norms int4": partial(option, {"whole_codec": "int4"}),
    "budget by sensitivity": water_filled,
    "best of 4 seeds, whole model": best_seed_of_model,
    "best of 4 seeds, each weight": best_seed_of_weight,
    "distilled scale a weight": distilled,
    "scale a row": row_scales,
    "bias correction": bias,
}
SAME_DRAW = (
    "embedding of rank 1",
    "one bit",
    "embedding int4",
    "norms int8",
    "norms int4",
    "distilled scale a weight",
    "scale a row",
    "bias correction",
)
"""These ideas keep the columns that weighted drop of this seed keeps."""

if __name__ == "__main__":
    main()
