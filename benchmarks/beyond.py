"""Ideas beyond weighted drop, each against it at equal bytes: ``python benchmarks/beyond.py FOLDER``.

FOLDER holds the fine-tunes of ``evidence.CORPUS``, of which ``frontier.py`` has measured weighted drop at several
sizes: on a line through those points (logarithms, medians over seeds) lies what an idea's bytes would otherwise buy.
``against_weighted`` is an idea's KL over that: below 1 it pays. Nothing but held-out text judges; what is tuned is
tuned on calibration text. Writes results/beyond.jsonl, row by row; an interrupted run goes on where it stopped.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import exp, log
from pathlib import Path

import torch
from beyond_corrections import bias, distilled, row_scales
from beyond_parts import best_seed_of_model, best_seed_of_weight, embedding_codec, norms, water_filled
from evidence import CORPUS, HERE, Row, Rows, Subject
from tqdm import tqdm

HELD_OUT_TOKENS, CALIBRATION_TOKENS = 768, 256
DROPS = (0.98, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variants", nargs="+", default=list(CORPUS), choices=list(CORPUS))
    parser.add_argument("--ideas", nargs="+", default=list(IDEAS), choices=list(IDEAS))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = Rows("beyond", "python benchmarks/beyond.py FOLDER")
    for name in args.variants:
        subject = Subject(name, args.folder, HELD_OUT_TOKENS, CALIBRATION_TOKENS)
        for idea, drop in tqdm([(idea, drop) for idea in args.ideas for drop in DROPS], desc=name):
            key = {"row": "idea", "variant": name, "idea": idea, "drop": drop, "seed": 0}
            rows.once(key, partial(against_weighted, subject, IDEAS[idea], drop))


def against_weighted(subject: Subject, measure: Callable[[Subject, float], Row], drop: float) -> Row:
    row = measure(subject, drop)
    return row | {"against_weighted": row["relative_kl"] / weighted_kl(subject.name, row["bytes"])}


def weighted_kl(variant: str, size: float) -> float:
    """Relative KL of weighted drop (V = 16, int2, embeddings of rank 4) in a file of so many bytes."""
    rows = map(json.loads, (HERE / "results" / "frontier.jsonl").read_text().splitlines())
    found: dict[int, list[float]] = {}
    for row in rows:
        setting = row.get("setting", "").removeprefix("weighted p=").removesuffix(" V=16 int2")
        if row.get("variant") == variant and setting.replace(".", "").isdigit():
            found.setdefault(row["bytes"], []).append(row["relative_kl"])
    points = sorted((log(size), log(statistics.median(kl))) for size, kl in found.items())
    near = next((pair for pair in pairwise(points) if log(size) <= pair[1][0]), points[-2:])
    (x0, y0), (x1, y1) = near
    return exp(y0 + (y1 - y0) * (log(size) - x0) / (x1 - x0))


IDEAS: dict[str, Callable[[Subject, float], Row]] = {
    "embedding int4": partial(embedding_codec, "int4"),
    "norms int8": partial(norms, "int8"),
    "norms int4": partial(norms, "int4"),
    "budget by sensitivity": water_filled,
    "best of 4 seeds, whole model": best_seed_of_model,
    "best of 4 seeds, each weight": best_seed_of_weight,
    "distilled scale a weight": distilled,
    "scale a row": row_scales,
    "bias correction": bias,
}

if __name__ == "__main__":
    main()
