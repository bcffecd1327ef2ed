"""Four sentiment tasks on one encoder: accuracy after compression: ``python benchmarks/encoder_tasks.py FOLDER``.

FOLDER holds the fine-tunes of all-MiniLM-L6-v2 that deploy/demo/encoder.py makes, by task. Each setting is compressed
with three seeds; the artifact is read back and classifies 1,000 random texts of the test split (all, where there are
fewer) beside the full fine-tune, in float32. ``--choose`` does the same on the calibration split, which settings are
chosen on. Writes results/encoder_tasks.jsonl row by row, and a plot; an interrupted run goes on where it stopped.
"""

import argparse
import json
import random
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from evidence import Row, Rows, goal
from torch import Tensor
from tqdm import tqdm

from corpora import SNIPPETS, Labelled, labelled  # isort: skip
from encoder import encoded, encoder_folder  # isort: skip
from deltaserve.delta_store.calibration import profile_for
from deltaserve.delta_store.checkpoint import Checkpoint, open_checkpoint
from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.fine_tune import FineTune, open_fine_tune
from deltaserve.delta_store.fingerprint import fingerprint
from deltaserve.delta_store.profile import Profile, profile_of
from deltaserve.delta_store.pruning.options import Value
from deltaserve.delta_store.running.weights import of_artifact, of_fine_tune
from deltaserve.delta_store.text import tokenizer_of

SEEDS = (0, 1, 2)
TEST_TEXTS = 1000
AT_ONCE = 64
ONE_BIT: dict[str, Value] = {"block": 1, "codec": "sign", "rank": 1, "embedding_codec": "int4", "whole_codec": "int4"}
SETTINGS: dict[str, tuple[str, dict[str, Value]]] = {
    "rank 1 and weighted p=0.885 V=1 1 bit, tasks' profile": ("low-rank-residual", {"drop": 0.885, **ONE_BIT}),
    "rank 2 and weighted p=0.91 V=1 1 bit, tasks' profile": (
        "low-rank-residual",
        {"drop": 0.91, "linear_rank": 2, **ONE_BIT},
    ),
    "weighted p=0.855 V=1 1 bit, tasks' profile": ("weighted", {"drop": 0.855, **ONE_BIT}),
    "weighted p=0.855 V=1 1 bit, tasks' profile, best of 4 draws": ("weighted", {"drop": 0.855, **ONE_BIT}),
    "weighted p=0.855 V=1 1 bit": ("weighted", {"drop": 0.855, **ONE_BIT}),
    "weighted p=0.95 V=1 int2, rank 2": ("weighted", {"drop": 0.95, "block": 1, "codec": "int2", "rank": 2}),
}
"""At 150 times smaller. The tasks' profile is of training texts of all four; otherwise it is of built-in text. The best
of four draws, four others for each seed, is chosen by its KL on the calibration split, without labels.
"""

DRAWS = 4

PROFILE_TEXTS = 60
"""Of each task, for the tasks' profile."""

RATIO, POINTS = 150, 1.0
TASKS = tuple(reversed(SNIPPETS))
"""The largest last."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--choose", action="store_true", help="on the calibration split")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = Rows("encoder_tasks", "python benchmarks/encoder_tasks.py FOLDER")
    split, row = ("calibration", "choice") if args.choose else ("test", "setting")
    tasks = [Task(task, args.folder / task, split) for task in args.tasks]
    for task in tasks:
        rows.once({"row": "fine-tune" if split == "test" else "fine-tune on choice", "task": task.name}, task.about)
    for setting in args.settings:
        method, options = SETTINGS[setting]
        for task in tqdm(tasks, desc=setting):
            for seed in SEEDS:
                key = {"row": row, "task": task.name, "setting": setting, "seed": seed}
                profile = tasks_profile(args.folder) if "tasks' profile" in setting else None
                draws = range(seed * DRAWS, (seed + 1) * DRAWS) if "draws" in setting else range(seed, seed + 1)
                rows.once(key, partial(task.best, method, options, profile, draws))
    rows.end(goals(rows.rows))
    plot(rows)


class Task:
    """A fine-tune and a split's texts, with the full fine-tune's log-probabilities of them."""

    def __init__(self, name: str, folder: Path, split: str) -> None:
        self.name, self.split = name, split
        self.folder = folder
        self.base: Checkpoint = open_checkpoint(encoder_folder())
        self.fine_tune: FineTune = open_fine_tune(folder, self.base)
        texts = labelled(name)[split]
        self.texts = random.Random(0).sample(texts, min(TEST_TEXTS, len(texts)))
        self.tokenizer = tokenizer_of(self.base.folder)
        self.wanted = predictions(of_fine_tune(self.fine_tune).model(), self.tokenizer, self.texts)
        self.labels = torch.tensor([example.label for example in self.texts])

    def about(self) -> Row:
        changes = [change.read() for change in self.fine_tune.changes() if ".layer." in change.name]
        matrices = [(d.fine - d.base).double() for d in changes if d.base.dim() == 2]
        squares, count = sum(m.square().sum().item() for m in matrices), sum(m.numel() for m in matrices)
        return {
            "test_texts": len(self.texts),
            "train_texts": len(labelled(self.name)["train"]),
            "majority": max(self.labels.double().mean().item(), 1 - self.labels.double().mean().item()),
            "accuracy": self.accuracy(self.wanted),
            "delta_std": (squares / count) ** 0.5,
            "parameters": self.fine_tune.parameters,
        }

    def accuracy(self, scores: Tensor) -> float:
        return (scores.argmax(1) == self.labels).double().mean().item()

    def best(self, method: str, options: dict[str, Value], profile: Path | None, draws: range) -> Row:
        """The one of these draws that is nearest to the full fine-tune on the calibration split."""
        chosen = draws[0]
        if len(draws) > 1:
            judge = self if self.split == "calibration" else Task(self.name, self.folder, "calibration")
            chosen = min(draws, key=lambda seed: judge.measure(method, {**options, "seed": seed}, profile)["kl"])
        return {"draw": chosen} | self.measure(method, {**options, "seed": chosen}, profile)

    def measure(self, method: str, options: dict[str, Value], profile: Path | None) -> Row:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "artifact.safetensors"
            receipt = compress(self.base.folder, self.folder, file, method=method, options=options, profile=profile)
            artifact = open_artifact(file)
            model = of_artifact(self.base, artifact, Profile.open(profile) if profile else profile_of(artifact)).model()
        given = predictions(model, self.tokenizer, self.texts)
        return {
            "bytes": receipt.size_bytes,
            "ratio": receipt.ratio,
            "kl": (self.wanted.exp() * (self.wanted - given)).sum(1).mean().item(),
            "agreement": (self.wanted.argmax(1) == given.argmax(1)).double().mean().item(),
            "accuracy": self.accuracy(given),
            "points_lost": 100 * (self.accuracy(self.wanted) - self.accuracy(given)),
        }


def tasks_profile(folder: Path) -> Path:
    """One profile for the four fine-tunes, beside them: how strong the base's inputs are on their training texts."""
    path = folder / "tasks-profile.safetensors"
    if not path.exists():
        texts = [text for task in SNIPPETS for text in random.Random(0).sample(labelled(task)["train"], PROFILE_TEXTS)]
        file = folder / "profile.jsonl"
        file.write_text("".join(json.dumps(text._asdict()) + "\n" for text in texts))
        base = open_checkpoint(encoder_folder())
        profile_for(base, fingerprint(base), file, path)
    return path


@torch.inference_mode()
def predictions(model: Any, tokenizer: Any, texts: list[Labelled]) -> Tensor:
    """float32 ``[texts, labels]``: log-probabilities of the classes."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].text))
    scores = torch.empty(len(texts), model.config.num_labels)
    for i in range(0, len(order), AT_ONCE):
        batch = order[i : i + AT_ONCE]
        logits = model(**encoded(tokenizer, [texts[j].text for j in batch])).logits
        scores[batch] = logits.float().log_softmax(-1)
    return scores


def goals(rows: list[Row]) -> list[Row]:
    """For each task the setting of at least ``RATIO`` whose worst seed loses least, and the median over the seeds."""
    found = []
    for task in SNIPPETS:
        lost: dict[str, list[float]] = {}
        for row in rows:
            if row["row"] == "setting" and row["task"] == task and row["ratio"] >= RATIO:
                lost.setdefault(row["setting"], []).append(row["points_lost"])
        whole = [setting for setting in lost if len(lost[setting]) == len(SEEDS)]
        if not whole:
            continue
        best = min(whole, key=lambda setting: max(lost[setting]))
        name = f"{task}: accuracy lost at {RATIO} times smaller or more, worst seed"
        more = {"setting": best, "seeds": len(lost[best]), "median": statistics.median(lost[best])}
        found.append(goal(name, max(lost[best]), POINTS, "lower", "points", **more))
    return found


def plot(rows: Rows) -> None:
    """Ratio against points lost: a panel a task."""
    figure, panels = plt.subplots(1, len(SNIPPETS), figsize=(3.4 * len(SNIPPETS), 3.6), sharey=True)
    for panel, task in zip(panels, SNIPPETS, strict=True):
        for setting in SETTINGS:
            points = [r for r in rows.rows if r["row"] == "setting" and (r["task"], r["setting"]) == (task, setting)]
            panel.plot([r["ratio"] for r in points], [r["points_lost"] for r in points], "o", label=setting)
        panel.axhline(POINTS, color="grey", linewidth=0.8)
        panel.axvline(RATIO, color="grey", linewidth=0.8)
        panel.set(title=task, xlabel="times smaller, whole variant")
    panels[0].set_ylabel("accuracy lost, points")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=2, fontsize=8)
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    figure.savefig(rows.path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
