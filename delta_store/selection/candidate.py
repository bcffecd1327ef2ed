"""What a search can try: families of settings, in each of which one number makes the artifact larger and better."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from deltaserve.delta_store.pruning.methods import KEPT, METHODS, method
from deltaserve.delta_store.pruning.options import Value

NARROW = 1.04
"""Densities that differ by less are one: in a row of 576 columns, 12 or 13 are kept."""

Settings = tuple[tuple[str, Value], ...]
"""Options and their values, sorted by name."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to make the artifact: a method, all of its options, and what survivors are divided by beside 1 - p."""

    method: str
    settings: Settings
    q: float = 1.0

    @property
    def key(self) -> str:
        """The same for the same artifact; a line of a journal is found by it."""
        return json.dumps([self.method, dict(self.settings), self.q])

    @classmethod
    def from_key(cls, key: str) -> "Candidate":
        """The candidate that has this key."""
        name, settings, q = json.loads(key)
        return cls(name, _sorted(settings), q)

    @property
    def label(self) -> str:
        """In the words of the command line, without the seed and without the usual codecs of what is not pruned."""
        shown = {name: value for name, value in self.settings if name not in ("seed", "judge", "per")}
        options = (f"{name}={v}" for name, v in shown.items() if name == "rank" or KEPT.get(name) != v)
        divided = [] if self.q == 1 else [f"q={self.q:g}(1-p)"]
        return " ".join([self.method, *options, *divided])

    def with_seed(self, seed: int) -> "Candidate":
        """The same drawn otherwise; itself where nothing is drawn."""
        settings = dict(self.settings)
        return replace(self, settings=_sorted(settings | {"seed": seed})) if "seed" in settings else self


@dataclass(frozen=True, slots=True)
class Family:
    """Candidates that differ in one number, ``axis``: the ``density`` 1 - p, a ``linear_rank``, or in none.

    ``start`` is where to look first; ``least`` and ``most`` bound the number.
    """

    method: str
    settings: Settings
    axis: str | None
    start: float
    least: float
    most: float
    q: float = 1.0

    def at(self, size: float) -> Candidate:
        """The candidate of this size, which is rounded: of a density three digits count."""
        if self.axis is None:
            return Candidate(self.method, self.settings, self.q)
        own = {"drop": round(1 - self.rounded(size), 8)} if self.axis == "density" else {self.axis: round(size)}
        return Candidate(self.method, _sorted({**dict(self.settings), **own}), self.q)

    def rounded(self, size: float) -> float:
        """The nearest size that there is."""
        within = min(max(size, self.least), self.most)
        return float(f"{within:.3g}") if self.axis == "density" else float(round(within))

    def beside(self, size: float, up: bool) -> float:
        """The next size that makes a difference."""
        if self.axis == "density":
            return self.rounded(size * NARROW if up else size / NARROW)
        return self.rounded(size + (1 if up else -1))

    @property
    def branch(self) -> str:
        return METHODS[self.method].branch

    @property
    def label(self) -> str:
        return Candidate(self.method, self.settings, self.q).label

    def but(self, name: str, value: Value) -> "Family":
        """The neighbour with one setting changed; ``q`` counts as one."""
        if name == "q":
            return replace(self, q=float(value))
        return replace(self, settings=_sorted({**dict(self.settings), name: value}))


AUTOMATIC: tuple[tuple[str, dict[str, Value], float, float], ...] = (
    # method, options beside its defaults, q, where to look first
    ("weighted", {"codec": "int2"}, 1.0, 0.02),
    ("weighted", {"codec": "sign"}, 1.0, 0.02),
    ("weighted", {"codec": "int4"}, 1.0, 0.01),
    ("dare", {"codec": "int2"}, 1.0, 0.02),
    ("darex", {"codec": "int2"}, 1.25, 0.02),
    ("magnitude", {"block": 1, "codec": "int2"}, 1.0, 0.03),
    ("magnitude", {"block": 16, "codec": "int2"}, 1.0, 0.1),
    ("low-rank", {}, 1.0, 4),
    ("low-rank-residual", {"linear_rank": 1, "codec": "int2"}, 1.0, 0.01),
    ("low-rank-residual", {"linear_rank": 1, "codec": "sign"}, 1.0, 0.02),
    ("dense", {"codec": "sign"}, 1.0, 1),
    ("dense", {"codec": "int2"}, 1.0, 1),
    ("dense-residual", {"codec": "sign"}, 1.0, 0.5),
)
"""For full fine-tunes. Left out: ``lossless``, and ``wanda`` and ``structural``, which were never best."""

OF_ADAPTERS: tuple[tuple[str, dict[str, Value], float, float], ...] = (
    ("lora", {}, 1.0, 1),
    ("lora-darex", {"codec": "int4"}, 1.0, 0.5),
    ("lora-darex", {"codec": "int8"}, 1.0, 1.0),
    ("weighted", {"codec": "int2"}, 1.0, 0.02),
    ("low-rank", {}, 1.0, 4),
)
"""Beside an adapter's own factors, the product of the two is compressed as that of any fine-tune."""


def families(is_adapter: bool, method_name: str | None, given: Mapping[str, Value], least: float) -> list[Family]:
    """What to search: all methods, or one, with the options that the user settled.

    ``least`` is the lowest density at which every block still keeps a column. Empty where no method takes them all.
    """
    rows = OF_ADAPTERS if is_adapter else AUTOMATIC
    if method_name is not None:
        known = tuple(row for row in rows if row[0] == method_name)
        rows = known or ((method_name, {}, 1.0, 1 - float(METHODS[method_name].defaults.get("drop", 0))),)
    found = [_family(*row, given, least) for row in rows if given.keys() <= METHODS[row[0]].defaults.keys()]
    return list(dict.fromkeys(found))


def _family(
    name: str, own: dict[str, Value], q: float, start: float, given: Mapping[str, Value], least: float
) -> Family:
    settings = {**method(name).defaults, **own, **given}
    method(name).options(settings)
    if "drop" in settings and "drop" not in given:
        del settings["drop"]
        return Family(name, _sorted(settings), "density", start, least, 1.0, q)
    if name == "low-rank" and "linear_rank" not in given:
        del settings["linear_rank"]
        return Family(name, _sorted(settings), "linear_rank", start, 1, 64)
    return Family(name, _sorted(settings), None, 1, 1, 1, q)


def _sorted(settings: Mapping[str, Value]) -> Settings:
    return tuple(sorted(settings.items()))
