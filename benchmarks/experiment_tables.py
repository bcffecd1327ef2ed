"""The tables of docs/experiments.md, from the rows in results/: ``python benchmarks/experiment_tables.py``."""

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
RATES = (0.9, 0.95, 0.99)
Row = dict[str, Any]

PAPER_METHODS: dict[str, Row] = {
    "DARE": {"method": "DARE"},
    "DAREx-q, one q, 1/q_e": {"method": "DAREx-q", "per": "model", "judge": "output"},
    "DAREx-q, one q, 1/q_v": {"method": "DAREx-q", "per": "model", "judge": "labels"},
    "DAREx-q, q a layer, 1/q_e": {"method": "DAREx-q", "per": "layer", "judge": "output"},
    "DAREx-q, q a layer, 1/q_v": {"method": "DAREx-q", "per": "layer", "judge": "labels"},
    "magnitude": {"method": "magnitude", "unbiased": False},
    "magnitude, unbiased scale": {"method": "magnitude", "unbiased": True},
    "Wanda": {"method": "Wanda", "unbiased": False},
    "Wanda, unbiased scale": {"method": "Wanda", "unbiased": True},
}


def main() -> None:
    for table in (paper, frontier, beyond, encoders):
        print("\n".join(table()), end="\n\n")


def paper() -> Iterable[str]:
    rows = read("paper_table")
    for about in select(rows, row="fine-tune"):
        variant = about["variant"]
        yield f"\n**{variant}**: delta std {about['delta_std']:.1e}, KL of the base {about['kl_base']:.2f}"
        yield from header(["KL in % of the base's (gain kept in %)", *(f"p = {p}" for p in RATES)])
        for label, key in PAPER_METHODS.items():
            cells = [figures(select(rows, row="setting", variant=variant, p=p, **key)) for p in RATES]
            if any(cell != "-" for cell in cells):
                yield line([label, *cells])


def figures(rows: list[Row]) -> str:
    """Medians over the seeds, with the extremes of the KL where there are several."""
    if not rows:
        return "-"
    kl = [100 * row["relative_kl"] for row in rows]
    extremes = f" [{min(kl):.2f} - {max(kl):.2f}]" if len(kl) > 1 else ""
    kept = 100 * statistics.median(row["gain_kept"] for row in rows)
    q = f", q {rows[0]['q'][0]:.2f} to {rows[0]['q'][1]:.2f}" if rows[0].get("q", [1, 1])[1] > 1 else ""
    return f"{statistics.median(kl):.2f}{extremes} ({kept:.0f}{q})"


def frontier() -> Iterable[str]:
    rows = read("frontier")
    variants = [about["variant"] for about in select(rows, row="fine-tune")]
    yield from header(["setting", *variants])
    settings = sorted(select(rows, row="setting"), key=lambda row: (not row["ours"], row["bytes"]))
    for setting in dict.fromkeys(row["setting"] for row in settings):
        cells = []
        for variant in variants:
            found = select(rows, row="setting", variant=variant, setting=setting)
            cells.append(f"{found[0]['ratio']:.0f}x: {figures(found)}" if found else "-")
        yield line([setting, *cells])


def beyond() -> Iterable[str]:
    """Each idea's KL over that of weighted drop in as many bytes: below 1 it pays."""
    rows = select(read("beyond"), row="idea")
    subjects = list(dict.fromkeys((row["variant"], row["drop"]) for row in rows))
    yield from header(["idea", *(f"{variant}, p = {drop}" for variant, drop in subjects)])
    for idea in dict.fromkeys(row["idea"] for row in rows):
        found = [select(rows, idea=idea, variant=variant, drop=drop) for variant, drop in subjects]
        yield line([idea, *(f"{row[0]['against_weighted']:.2f}" if row else "-" for row in found)])


def encoders() -> Iterable[str]:
    rows = read("encoder_tasks")
    tasks = select(rows, row="fine-tune")
    yield from header(["", *(task["task"] for task in tasks)])
    for label, cell in ABOUT.items():
        yield line([label, *map(cell, tasks)])
    for setting in dict.fromkeys(row["setting"] for row in select(rows, row="setting")):
        cells = []
        for task in tasks:
            found = select(rows, row="setting", task=task["task"], setting=setting)
            lost = sorted(row["points_lost"] for row in found)
            kl = statistics.median(row["kl"] for row in found) if found else 0
            text = f"{found[0]['ratio']:.0f}x: " + ", ".join(f"{-x:+.1f}" for x in lost) if found else "-"
            cells.append(f"{text} (KL {kl:.3f})" if found else text)
        yield line([setting, *cells])


ABOUT: dict[str, Callable[[Row], str]] = {
    "texts: train, test": lambda row: f"{row['train_texts']}, {row['test_texts']}",
    "delta std": lambda row: f"{row['delta_std']:.1e}",
    "larger class, %": lambda row: f"{100 * row['majority']:.1f}",
    "full fine-tune, %": lambda row: f"{100 * row['accuracy']:.1f}",
}


def read(name: str) -> list[Row]:
    """None where nothing was measured yet."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def select(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def header(cells: list[str]) -> Iterable[str]:
    return ["", line(cells), line(["---"] * len(cells))]


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
