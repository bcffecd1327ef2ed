"""The plot of a search: whole-variant bytes against loss, with every point that was tried."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.selection.candidate import Candidate
from deltaserve.delta_store.selection.journal import Point


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def check_plot(path: Path | None) -> None:
    """Raise OptionError where a plot was asked for and none can be drawn there."""
    if path is None:
        return
    if not can_plot():
        raise OptionError(f"No plot without matplotlib; run: pip install 'deltaserve[plot]', or leave {path} out")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise OptionError(f"{path} is no kind of plot; its name ends in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"The folder {path.absolute().parent} does not exist; make it first")


def draw(path: Path, tried: Iterable[tuple[Candidate, str, Point]], chosen: Candidate, allowed: float | None) -> None:
    """One mark a candidate and text, one colour a method; ``allowed`` is the KL limit, if there is one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    markers = {"short": ".", "calibration": "o", "held-out": "s"}
    colours: dict[str, str] = {}
    labelled: set[tuple[str, str]] = set()
    for candidate, text, point in tried:
        if not point.kl > 0:
            continue
        colour = colours.setdefault(candidate.method, f"C{len(colours)}")
        label = None if (candidate.method, text) in labelled else f"{candidate.method}, {text}"
        labelled.add((candidate.method, text))
        axes.plot(point.bytes, point.kl, markers.get(text, "x"), color=colour, label=label, alpha=0.7)
        if candidate == chosen and text == "held-out":
            axes.plot(point.bytes, point.kl, "*", color="black", markersize=14, label=f"chosen: {candidate.label}")
    if allowed is not None:
        axes.axhline(allowed, color="grey", linestyle="--", label="allowed on held-out text")
    axes.set(xlabel="whole variant, bytes", ylabel="KL to the full fine-tune, nats a token", xscale="log", yscale="log")
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)
