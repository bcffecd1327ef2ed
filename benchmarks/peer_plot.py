"""The plot of peers.py: tokens a second and time to first token at each concurrency, a row of panels a piece."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

TITLES = {"base": "base alone", "1": "1 variant", "16": "16 variants", "64": "64 variants", "merged": "4 variants"}
MEASURES = {"tokens_per_s": "tokens a second", "ttft_ms": "median TTFT, ms"}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Medians over the repeats, with the 20th and 80th percentiles."""
    from matplotlib.figure import Figure

    pieces = [piece for piece in TITLES if any(row.get("piece") == piece for row in rows)]
    if not pieces:
        return
    figure = Figure(figsize=(3 * len(pieces), 6), layout="constrained")
    panels = figure.subplots(len(MEASURES), len(pieces), squeeze=False)
    for column, piece in enumerate(pieces):
        own = [row for row in rows if row.get("piece") == piece]
        for axis, (measure, label) in zip(panels[:, column], MEASURES.items(), strict=True):
            for number, system in enumerate(dict.fromkeys(row["system"] for row in own)):
                found = [row for row in own if row["system"] == system]
                medians = [row[measure]["median"] for row in found]
                low = [row[measure]["median"] - row[measure]["p20"] for row in found]
                high = [row[measure]["p80"] - row[measure]["median"] for row in found]
                at = [position + 0.25 * number for position in range(len(found))]
                axis.bar(at, medians, width=0.25, yerr=[low, high], capsize=2, label=system)
                axis.set_xticks([p + 0.25 for p in range(len(found))], [row["concurrency"] for row in found])
            axis.set(title=TITLES[piece], xlabel="concurrent requests", ylabel=label)
            axis.grid(alpha=0.3, axis="y")
        panels[0, column].legend(fontsize="x-small")
    figure.savefig(path, dpi=150)
