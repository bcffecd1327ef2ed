"""The journal of a search: every point that was measured, so that an interrupted search measures none again."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from deltaserve.delta_store.errors import OptionError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Point:
    """A candidate measured on one text, in float32; losses and KL in nats a token.

    ``bytes`` are the whole file's, without a report. ``score`` is the share of samples whose greedy answer is exactly
    theirs. ``loss_fine_tuned`` is the full fine-tune's on the same text.
    """

    bytes: int
    tokens: int
    kl: float
    kl_p99: float
    agreement: float
    loss: float
    loss_fine_tuned: float
    score: float
    score_fine_tuned: float

    @property
    def disagreement(self) -> float:
        return 1 - self.agreement

    @property
    def mistakes(self) -> float:
        return 1 - self.score


_LINE = TypeAdapter(tuple[str, str, Point])


class Journal:
    """A file of one header line and a line a point; each is on disk before the next is measured.

    ``identity`` says everything that decides what a candidate measures. A file of another search is begun anew; one
    that is no journal is refused with OptionError.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.header = json.dumps({"deltaserve_search": FORMAT, "identity": identity})
        self.points: dict[tuple[str, str], Point] = {}
        lines = _lines(path)
        self.resumed = bool(lines) and lines[0] == self.header
        if not self.resumed:
            path.write_text(f"{self.header}\n")
            return
        self.points = _points(lines[1:])
        if not path.read_text().endswith("\n"):
            with path.open("a") as file:
                file.write("\n")

    def add(self, key: str, text: str, point: Point) -> None:
        """Remember what candidate ``key`` gave on ``text``."""
        self.points[key, text] = point
        with self.path.open("a") as file:
            file.write(json.dumps([key, text, asdict(point)]) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_points(path: Path) -> dict[tuple[str, str], Point]:
    """What a search has measured so far, by candidate's key and text; nothing where there is no journal yet."""
    return _points(_lines(path)[1:])


def _points(lines: Sequence[str]) -> dict[tuple[str, str], Point]:
    points: dict[tuple[str, str], Point] = {}
    for line in lines:
        try:
            key, text, point = _LINE.validate_json(line)
        except ValidationError:  # the line that was being written when the search was interrupted
            continue
        points[key, text] = point
    return points


def _lines(path: Path) -> list[str]:
    """Of an earlier journal; none where there is none."""
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        is_journal = "deltaserve_search" in json.loads(lines[0])
    except (OSError, UnicodeDecodeError, IndexError, ValueError, TypeError):
        is_journal = False
    if not is_journal:
        raise OptionError(f"{path} is there and is no journal of a search; move it, or write the artifact elsewhere")
    return lines
