"""What compression costs on held-out text: ``python benchmarks/compression.py FOLDER``.

FOLDER is as for deploy/demo/artifacts.py. For each demo fine-tune: weighted drop and plain DARE at the same bytes (same
p, V and codec) and DARE as published (V = 1, bf16), three seeds each; and weighted drop with profiles of other text.
Writes results/compression.jsonl and a plot.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
DEMO = HERE.parent / "deploy" / "demo"
sys.path.insert(0, str(DEMO))

from artifacts import compress, setup_row, write_examples  # noqa: E402
from corpora import CORPORA, load  # noqa: E402

SEEDS = (0, 1, 2)
SETTINGS = {
    "weighted p=0.98 V=16 int2": ("weighted", "--drop", "0.98", "--block", "16", "--codec", "int2"),
    "dare p=0.98 V=16 int2": ("dare", "--drop", "0.98", "--block", "16", "--codec", "int2"),
    "weighted p=0.95 V=16 int4": ("weighted", "--drop", "0.95", "--block", "16", "--codec", "int4"),
    "dare p=0.99 V=1 bf16": ("dare", "--drop", "0.99", "--block", "1", "--codec", "bf16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variants", nargs="+", default=list(CORPORA), choices=list(CORPORA))
    args = parser.parse_args()
    rows = [setup_row("python benchmarks/compression.py FOLDER")]
    results = HERE / "results" / "compression.jsonl"
    results.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.variants:
            for row in measure(name, args.folder / name, Path(folder)):
                print(json.dumps(row), flush=True)
                rows.append(row)
                results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot(rows, results.with_suffix(".png"))


def measure(name: str, fine_tuned: Path, folder: Path) -> list[dict[str, Any]]:
    held_out = write_examples(load(name)["test"], folder / f"{name}.jsonl")
    rows = []
    for label, (method, *options) in SETTINGS.items():
        profile = ["--profile", str(DEMO / "profile.safetensors")] if method == "weighted" else []
        rows.append(figures(name, fine_tuned, held_out, label, [method, *options, *profile], SEEDS))
    for text in CORPORA:
        calibration = write_examples(load(text)["calibration"], folder / f"calibration-{text}.jsonl")
        method, *options = SETTINGS["weighted p=0.98 V=16 int2"]
        label = f"weighted p=0.98 V=16 int2, profile of {text}"
        rows.append(
            figures(name, fine_tuned, held_out, label, [method, *options, "--calibration", str(calibration)], (0,))
        )
    return rows


def figures(
    name: str, fine_tuned: Path, held_out: Path, label: str, options: list[str], seeds: tuple[int, ...]
) -> dict[str, Any]:
    """One setting over its seeds: KL and kept share of the fine-tune's gain in loss, median and extremes."""
    receipts = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            evaluate = ["--evaluate", str(held_out), "--seed", str(seed)]
            receipts.append(compress(fine_tuned, Path(folder) / "a.safetensors", "--method", *options, *evaluate))
    quality = [receipt["quality"] for receipt in receipts]
    kept = [(q["loss_base"] - q["loss_artifact"]) / (q["loss_base"] - q["loss_fine_tuned"]) for q in quality]
    return {
        "row": "setting",
        "variant": name,
        "setting": label,
        "seeds": list(seeds),
        "bytes": receipts[0]["size_bytes"],
        "full_bytes": receipts[0]["full_bytes"],
        "tokens": quality[0]["tokens"],
        "kl": spread([q["kl_mean"] for q in quality]),
        "top1_agreement": spread([q["top1_agreement"] for q in quality]),
        "gain_kept": spread(kept),
        "loss_base": quality[0]["loss_base"],
        "loss_fine_tuned": quality[0]["loss_fine_tuned"],
        "loss_artifact": spread([q["loss_artifact"] for q in quality]),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Whole-variant bytes against KL, one panel a variant."""
    variants = sorted({row["variant"] for row in rows if row["row"] == "setting"})
    figure, panels = plt.subplots(1, len(variants), figsize=(5 * len(variants), 4), squeeze=False, sharey=True)
    for panel, name in zip(panels[0], variants, strict=True):
        for label in SETTINGS:
            row = next(row for row in rows if row.get("variant") == name and row["setting"] == label)
            kl = row["kl"]
            error = [[kl["median"] - kl["min"]], [kl["max"] - kl["median"]]]
            panel.errorbar(row["bytes"] / 1e6, kl["median"], yerr=error, fmt="o", capsize=3, label=label)
        panel.set(title=name, xlabel="whole variant, MB", xscale="log", yscale="log")
    panels[0][0].set_ylabel("KL to the full fine-tune, nats a token")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
