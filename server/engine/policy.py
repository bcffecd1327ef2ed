"""When a variant goes into the base's weights, and when it comes out again: decided before each step."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.engine.jobs import Job
from deltaserve.server.engine.swapping import Swapping
from deltaserve.server.engine.wrapped import Fitted

logger = logging.getLogger(__name__)

KINDS = ("auto", "mixed", "swap")

SWAP_SECONDS_A_BYTE = 1e-8
"""For a swap in and out, of what it overwrites; until a version's own are measured (SmolLM2, one thread: 1.1e-8)."""
SHARE = 0.05
"""How much of a step deltas cost, until a version's own are measured (SmolLM2, 1 to 16 requests: 0.05 to 0.06)."""
LEAST_SHARE = 0.005
"""A share that comes out smaller is noise; the version gets another chance, later."""
COMPARED_STEPS = 8
"""Decoding steps before and after a swap that are compared, all with as many rows; no fewer come before a swap."""


@dataclass(slots=True)
class Costs:
    """Of one version: seconds to swap it in and out, and how much of a step its deltas cost otherwise."""

    swap_s: float
    share: float


class Policy:
    """``mixed`` never swaps, ``swap`` always does (its batches have one owner each), ``auto`` when it pays.

    In ``auto`` a version is swapped in once it has been alone for so long that its deltas have cost as much as the swap
    will: whatever comes next, all this costs at most twice what the best choice in hindsight would. It is out before a
    step that has a row of anybody else. After a swap that failed nothing is swapped any more.

    ``room()``: bytes that what is overwritten may take; ``is_resident(digest)``: whether a version is still in memory.
    For metrics: ``swapped`` is the digest of the version in the base's weights, empty if there is none, ``swaps`` and
    ``swap_seconds`` count since the start, ``failure`` says why nothing is swapped, if it could be.
    """

    def __init__(
        self, kind: str, swapping: Swapping | None, room: Callable[[], int], is_resident: Callable[[str], bool]
    ) -> None:
        self.kind = kind
        self.swapped = ""
        self.swaps, self.swap_seconds = 0, 0.0
        self.failure: str | None = None
        self._swapping = swapping
        self._room, self._is_resident = room, is_resident
        self._costs: dict[str, Costs] = {}
        self._owner = ""
        self._spent = 0.0
        self._steps: deque[tuple[int, float]] = deque(maxlen=COMPARED_STEPS)
        self._before: tuple[int, float] | None = None

    def before_step(self, jobs: Sequence[Job]) -> bool:
        """Whether all of these requests' rows are those of the variant that is in the base's weights."""
        if self._swapping is None or self.failure is not None:
            return False
        digests = {job.digest for job in jobs}
        owner = digests.pop() if len(digests) == 1 else ""
        if owner != self._owner:
            self._owner, self._spent, self._before = owner, 0.0, None
            self._steps.clear()
        if owner != self.swapped:
            if self.swapped:
                self._swap_out(self._swapping)
            if owner and self._pays(owner, jobs[0].fitted):
                self._swap_in(self._swapping, jobs[0])
        return self.swapped != ""

    def after_step(self, decodes: int, seconds: float) -> None:
        """``decodes``: its rows, if each was a request's next token, else 0."""
        if not self._owner:
            return
        if not self.swapped and (costs := self._costs.get(self._owner)) is not None:
            self._spent += seconds * costs.share
        if decodes:
            self._steps.append((decodes, seconds))
        if self.swapped and self._before is not None and (after := self._typical_step()) is not None:
            self._compare(self._before, after)

    def idle(self) -> None:
        """Nothing runs: a version that is not in memory any more need not stay in the weights."""
        if self.swapped and self._swapping is not None and not self._is_resident(self.swapped):
            self._swap_out(self._swapping)

    def restore(self) -> None:
        """Make sure of the base after a step or swap that failed. Raises EngineDown if it is lost."""
        self.swapped, self._owner = "", ""
        if self._swapping is not None:
            self._swapping.restore()

    def _pays(self, digest: str, fitted: Fitted | None) -> bool:
        if fitted is None or not fitted.overwrites:
            return False
        costs = self._costs.setdefault(digest, Costs(fitted.overwrites * SWAP_SECONDS_A_BYTE, SHARE))
        long_enough = len(self._steps) == COMPARED_STEPS and self._spent >= costs.swap_s
        return (self.kind == "swap" or long_enough) and fitted.overwrites <= self._room()

    def _swap_in(self, swapping: Swapping, job: Job) -> None:
        start = perf_counter()
        try:
            swapping.swap_in(job.fitted, job.slot)  # type: ignore[arg-type]  # it pays
        except Exception as error:  # the requests go on without
            return self._give_up(swapping, error)
        self.swapped = job.digest
        self._costs[job.digest].swap_s = 2 * self._count(start)
        self._before = self._typical_step()
        self._steps.clear()

    def _swap_out(self, swapping: Swapping) -> None:
        start, digest = perf_counter(), self.swapped
        try:
            swapping.swap_out()
        except Exception as error:  # the base is still to be had
            return self._give_up(swapping, error)
        self.swapped = ""
        costs = self._costs[digest]
        costs.swap_s = costs.swap_s / 2 + self._count(start)

    def _count(self, start: float) -> float:
        seconds = perf_counter() - start
        self.swaps += 1
        self.swap_seconds += seconds
        return seconds

    def _give_up(self, swapping: Swapping, error: Exception) -> None:
        self.failure = f"A swap failed: {error}"
        logger.error("A swap failed, and from now on no variant is swapped into the base's weights", exc_info=error)
        self.swapped = ""
        swapping.restore()

    def _typical_step(self) -> tuple[int, float] | None:
        """Rows and seconds of the last decoding steps, once there are enough alike."""
        rows = {rows for rows, _ in self._steps}
        if len(self._steps) < COMPARED_STEPS or len(rows) > 1:
            return None
        return rows.pop(), median(seconds for _, seconds in self._steps)

    def _compare(self, before: tuple[int, float], after: tuple[int, float]) -> None:
        self._before = None
        if before[0] == after[0]:
            costs = self._costs[self._owner]
            costs.share = (costs.share + max(1 - after[1] / before[1], LEAST_SHARE)) / 2


def check_kind(kind: str, fixed: str | None) -> None:
    """Raise OptionError for a policy that is unknown, or that a base whose weights are ``fixed`` cannot have."""
    if kind not in KINDS:
        raise OptionError(f"Unknown policy {kind!r}; known are {', '.join(KINDS)}")
    if kind == "swap" and fixed is not None:
        raise OptionError(f"Policy 'swap' puts variants into the base's weights, but {fixed}; use auto or mixed")
