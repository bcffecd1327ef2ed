"""Whole variants' bytes against relative KL, beside neighbouring systems: ``python benchmarks/frontier.py FOLDER``.

FOLDER holds the fine-tunes of ``evidence.CORPUS``. Our methods are measured from their files. Neighbours
(``neighbours.py``) encode linear weights at their own operating points; they get our encoding of embeddings and norms,
which is smaller than the 16 bits that they keep these in: ``bytes`` is with ours, ``bytes_published`` with theirs.
Relative KL is the KL to the full fine-tune over that of the base. Writes results/frontier.jsonl row by row, and a plot;
an interrupted run goes on where it stopped.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from evidence import CORPUS, Row, Rows, Subject, goal
from neighbours import KINDS, NEIGHBOURS, Encode
from torch import Tensor
from tqdm import tqdm

from deltaserve.delta_store.merge import variant_tensors
from deltaserve.delta_store.pruning.options import Value

SEEDS = (0, 1, 2)
HELD_OUT_TOKENS = 768
ELSE_INT4: dict[str, Value] = {"embedding_codec": "int4", "whole_codec": "int4"}
OURS: dict[str, tuple[str, dict[str, Value]]] = {
    "weighted p=0.99 V=16 int2, rank 1": ("weighted", {"drop": 0.99, "codec": "int2", "rank": 1}),
    "weighted p=0.99 V=16 int2": ("weighted", {"drop": 0.99, "codec": "int2"}),
    "weighted p=0.98 V=16 int2": ("weighted", {"drop": 0.98, "codec": "int2"}),
    "weighted p=0.96 V=16 int2": ("weighted", {"drop": 0.96, "codec": "int2"}),
    "weighted p=0.9 V=16 int4": ("weighted", {"drop": 0.9, "codec": "int4"}),
    "dense 1 bit": ("dense", {"codec": "sign"}),
    "dense 2 bits, rank 32": ("dense", {"codec": "int2", "rank": 32}),
    "weighted p=0.8 V=16 int4": ("weighted", {"drop": 0.8, "codec": "int4"}),
    "weighted p=0.95 V=16 int2": ("weighted", {"drop": 0.95, "codec": "int2"}),
    "weighted p=0.98 V=1 int2": ("weighted", {"drop": 0.98, "codec": "int2", "block": 1}),
    "weighted p=0.995 V=16 int2, rank 1": ("weighted", {"drop": 0.995, "codec": "int2", "rank": 1}),
    "weighted p=0.995 V=16 int2": ("weighted", {"drop": 0.995, "codec": "int2"}),
    "weighted p=0.98 V=1 int2, all else int4": ("weighted", {"drop": 0.98, "codec": "int2", "block": 1, **ELSE_INT4}),
    "weighted p=0.99 V=1 int2, all else int4": ("weighted", {"drop": 0.99, "codec": "int2", "block": 1, **ELSE_INT4}),
    "weighted p=0.995 V=1 1 bit, rank 1, all else int4": (
        "weighted",
        {"drop": 0.995, "codec": "sign", "block": 1, "rank": 1, **ELSE_INT4},
    ),
}
"""The first ones, about the goals, have several seeds."""

SEVERAL_SEEDS = tuple(OURS)[:4]
LARGE_DELTA = 6e-4
"""Standard deviation between ordinary fine-tunes (up to 3e-4 or so) and large ones (about 1e-3)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variants", nargs="+", default=list(CORPUS), choices=list(CORPUS))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = Rows("frontier", "python benchmarks/frontier.py FOLDER")
    for name in args.variants:
        subject = Subject(name, args.folder, HELD_OUT_TOKENS, 0)
        rows.once({"row": "fine-tune", "variant": name}, subject.about)
        for key, measure in tqdm(settings(subject), desc=name):
            rows.once({"row": "setting", "variant": name, **key}, measure)
    rows.end(goals(rows.rows))
    plot(rows)


def settings(subject: Subject) -> list[tuple[Row, Callable[[], Row]]]:
    """What is measured, by its key, in the order of how much it says."""

    def ours(name: str, seed: int) -> tuple[Row, Callable[[], Row]]:
        method, options = OURS[name]
        seeded = options | ({} if method == "dense" else {"seed": seed})
        return {"setting": name, "ours": True, "seed": seed}, partial(subject.measure, method, seeded)

    theirs = [
        ({"setting": name, "ours": False, "seed": 0}, partial(neighbour, subject, encode, 0))
        for name, encode in NEIGHBOURS.items()
    ]
    seeds = [ours(name, seed) for seed in SEEDS[1:] for name in SEVERAL_SEEDS]
    return [*(ours(name, 0) for name in SEVERAL_SEEDS), *theirs, *seeds, *(ours(name, 0) for name in OURS)]


def neighbour(subject: Subject, encode: Encode, seed: int) -> Row:
    """The linear weights as the neighbour encodes them, all else as we do."""
    generator = torch.Generator().manual_seed(seed)
    rest, rest_bytes = all_else(subject)
    bits = 0.0

    def decode(name: str) -> Tensor:
        nonlocal bits
        decoded, size = encode(subject.delta(name), generator)
        bits += size
        return decoded

    tensors = [(name, rest.get(name, tensor)) for name, tensor in subject.variant(decode)]
    published = bits / 8 + 2 * sum(tensor.numel() for tensor in rest.values())
    row = subject.measure_tensors(iter(tensors), round(bits / 8 + rest_bytes))
    return row | {"bytes_published": round(published)}


@lru_cache(maxsize=1)
def all_else(subject: Subject) -> tuple[dict[str, Tensor], int]:
    """Embeddings and norms of our artifacts, and their bytes."""
    with subject.artifact("dense", {"codec": "sign"}) as (artifact, profile):
        tensors = variant_tensors(subject.base, artifact, profile, torch.float32)
        rest = {name: tensor for name, tensor in tensors if name not in subject.linears}
        with artifact.path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__")
        sizes = {key: entry["data_offsets"][1] - entry["data_offsets"][0] for key, entry in header.items()}
        return rest, sum(size for key, size in sizes.items() if key.rpartition(":")[0] in rest)


Frontier = list[tuple[str, float, float, float]]
"""Settings with their bytes, relative KL and share of the gain kept, the last two as medians over seeds."""


def medians(rows: list[Row], variant: str, ours: bool) -> Frontier:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["row"] == "setting" and row["variant"] == variant and row["ours"] == ours:
            found.setdefault(row["setting"], []).append(row)
    return [
        (
            name,
            several[0]["bytes"],
            *(statistics.median(r[key] for r in several) for key in ("relative_kl", "gain_kept")),
        )
        for name, several in found.items()
    ]


def goals(rows: list[Row]) -> list[Row]:
    found = []
    for about in (row for row in rows if row["row"] == "fine-tune"):
        variant, full = about["variant"], 2 * about["parameters"]
        ours, theirs = medians(rows, variant, True), medians(rows, variant, False)
        large = about["delta_std"] > LARGE_DELTA
        for within, ratio in ((0.02, 150),) if large else ((0.02, 400), (0.007, 150)):
            passing = [(full / size, name) for name, size, kl, kept in ours if kl <= within and kept >= 0.95]
            value, setting = max(passing, default=(None, None))
            name = f"{variant}: times smaller at relative KL <= {within:.1%} and >= 95 % of the gain kept"
            found.append(goal(name, value, ratio, "higher", "x", setting=setting, delta_std=about["delta_std"]))
        for name, size, kl, _ in theirs:
            no_larger = [our_kl for _, our_size, our_kl, _ in ours if our_size <= size]
            value = min(no_larger) / kl if no_larger else None
            found.append(goal(f"{variant}: our KL over that of {name} in no more bytes", value, 1.0, "lower", "share"))
    return found


def plot(rows: Rows) -> None:
    """Bytes against relative KL, a panel a fine-tune; medians over the seeds."""
    variants = [row["variant"] for row in rows.rows if row["row"] == "fine-tune"]
    figure, panels = plt.subplots(1, len(variants), figsize=(4.4 * len(variants), 4.2), squeeze=False, sharey=True)
    for panel, variant in zip(panels[0], variants, strict=True):
        ours = sorted(medians(rows.rows, variant, True), key=lambda point: point[1])
        panel.plot([p[1] / 1e6 for p in ours], [100 * p[2] for p in ours], "o", color="tab:blue", label="ours")
        for kind in KINDS:
            found = [p for p in medians(rows.rows, variant, False) if p[0].startswith(kind)]
            points = sorted(found, key=lambda point: point[1])
            panel.plot([p[1] / 1e6 for p in points], [100 * p[2] for p in points], "x--", linewidth=0.8, label=kind)
        panel.set(title=variant, xlabel="whole variant, MB", xscale="log", yscale="log")
    panels[0][0].set_ylabel("KL to the full fine-tune, % of the base's")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(rows.path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
