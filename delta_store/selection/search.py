"""The search: survey all families on little text, let the best compete on all of it, vary the winner, confirm it.

The paper's flowchart (large deltas to importance or low rank or a larger q, small ones to random drop) is what the
survey decides by measurement.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.pruning.options import BLOCKS, Value
from deltaserve.delta_store.selection.approach import (
    Trial,
    approach,
    best_of,
    crossing,
    expected_cost,
    further,
    slope_of,
)
from deltaserve.delta_store.selection.candidate import Candidate, Family
from deltaserve.delta_store.selection.journal import Point
from deltaserve.delta_store.selection.tolerance import Goal, Tolerance

SHORT, CALIBRATION, HELD_OUT = "short", "calibration", "held-out"
SURVEY_ROUNDS, CONTEST_ROUNDS, REFINE_ROUNDS, TIGHTENINGS = 2, 5, 3, 4
CONTENDERS, MARGIN = 4, 1.4
HOPELESS = 3.0
"""A family that is expected to cost so many times the best's is not looked at twice."""

GAIN = 0.99
"""A neighbour is moved to where it costs at most this much of the best."""

RAISED_RANKS = (16, 64)
CHOICES: dict[str, tuple[Value, ...]] = {
    "codec": ("sign", "int2", "int4", "int8"),
    "rank": (0, 1, 2, 4, 8, 16, 32, 64),
    "embedding_codec": ("int4", "int8"),
    "whole_codec": ("int4", "int8", "bf16"),
    "linear_rank": (1, 2, 4),
    "block": BLOCKS,
    "q": (1.0, 1.1, 1.25, 1.5),
    "seed": (0, 1, 2, 3),
}
"""What the winner is varied in, in this order; q as a multiple of 1 - p."""

SAFETY = 0.97
SCORE_STEP = 0.7
"""A score says nothing of how far off it is, so the KL that steers for it is lowered by this."""

Measure = Callable[[Candidate, str], Point]


@dataclass(frozen=True, slots=True)
class Found:
    """``trial`` was measured on calibration text and is ``confirmed`` on held-out text, or is the nearest to it."""

    trial: Trial
    held_out: Point
    allowed: Goal
    confirmed: bool
    notes: tuple[str, ...]


@dataclass(slots=True, eq=False)
class Search:
    """One search. ``measure`` gives a candidate's point on a text, ``bases`` what the bare base gives there.

    ``settled`` are options that the user chose, which are not varied. ``stage`` is called with the name of what begins.
    """

    tolerance: Tolerance
    measure: Measure
    bases: Callable[[str], Point | None]
    settled: Collection[str] = ()
    stage: Callable[[str], None] = lambda name: None
    notes: list[str] = field(default_factory=list)

    def run(self, families: list[Family]) -> Found:
        """The best of ``families`` and their neighbours. Raises OptionError where the full fine-tune misses."""
        judge = self.tolerance.goal(self.bases(CALIBRATION))
        steer = self._steer(families[0], judge)
        ranked, goal = self._survey(families, steer)
        trials = self._contest(ranked, goal, steer)
        best = best_of(trials, judge) or best_of(trials, steer) or min(trials, key=lambda t: judge.excess(t.point))
        best, trials = self._refine(best, trials, steer, judge)
        return self._confirm(best, [t for t in trials if t.family == best.family], steer)

    def _steer(self, family: Family, judge: Goal) -> Goal:
        """What leads the search. A score has steps, so the largest KL that it was reached with stands for it."""
        if judge.error != "mistakes":
            return judge
        self.stage("Score")
        trials = approach(family, judge, self._on(CALIBRATION), family.start, CONTEST_ROUNDS)
        if trials[0].point.score_fine_tuned < self.tolerance.value:
            own = f"the full fine-tune's own is {trials[0].point.score_fine_tuned:.1%}"
            raise OptionError(f"The score of {self.tolerance.value:.1%} cannot be reached: {own} on this text")
        kl = max((t.point.kl for t in trials if judge.fits(t.point)), default=min(t.point.kl for t in trials) / 2)
        self.notes.append(f"Score: {self.tolerance.label} held up to KL {kl:.4g} ({family.label}), which steers")
        return Goal("kl", kl)

    def _survey(self, families: list[Family], steer: Goal) -> tuple[list[list[Trial]], Goal]:
        """Two trials a family, one where that is far off; best expectation first. And what the short text allows."""
        self.stage("Survey")
        goal = steer.on_other_text(self.bases(CALIBRATION), self.bases(SHORT))
        first = [approach(family, goal, self._on(SHORT), family.start, 1) for family in families]
        limit = HOPELESS * min(_surely(trials[0], goal) for trials in first)
        surveyed = [
            further(trials, goal, self._on(SHORT), SURVEY_ROUNDS if expected_cost(trials, goal) <= limit else 1)
            for trials in first
        ]
        surveyed.sort(key=lambda trials: expected_cost(trials, goal))
        branches: dict[str, str] = {}
        for trials in surveyed:
            family, cost = trials[0].family, expected_cost(trials, goal)
            branches.setdefault(family.branch, f"{family.branch} {_amount(cost, goal)} ({family.label})")
        self.notes.append(f"Survey, expected: {'; '.join(branches.values())}")
        return surveyed, goal

    def _contest(self, ranked: list[list[Trial]], goal: Goal, steer: Goal) -> list[Trial]:
        """The leaders on all calibration text; where none fits, with more of the embedding, and then the others too."""
        self.stage("Contest")
        limit = MARGIN * expected_cost(ranked[0], goal)
        leaders = [surveyed for surveyed in ranked[:CONTENDERS] if expected_cost(surveyed, goal) <= limit]
        others = [surveyed for surveyed in ranked if surveyed not in leaders]
        trials = [trial for surveyed in leaders for trial in self._enter(surveyed, goal, steer, None)]
        for rank in RAISED_RANKS:
            if not best_of(trials, steer) and "rank" not in self.settled:
                trials += [trial for surveyed in leaders for trial in self._enter(surveyed, goal, steer, rank)]
        while others and not best_of(trials, steer):
            trials += self._enter(others.pop(0), goal, steer, None if "rank" in self.settled else RAISED_RANKS[-1])
        return trials

    def _enter(self, surveyed: list[Trial], goal: Goal, steer: Goal, rank: int | None) -> list[Trial]:
        """One family from where the survey saw it cross; with another embedding ``rank``, if it has one."""
        family = surveyed[0].family
        if rank is not None:
            if "rank" not in dict(family.settings):
                return []
            family = family.but("rank", rank)
        found = approach(family, steer, self._on(CALIBRATION), crossing(surveyed, goal), CONTEST_ROUNDS)
        self.notes.append(f"Contest: {self._said(best_of(found, steer) or found[-1], steer)}")
        return found

    def _refine(self, best: Trial, trials: list[Trial], steer: Goal, judge: Goal) -> tuple[Trial, list[Trial]]:
        """Vary one setting after the other, each as long as that pays; the best, and all trials."""
        self.stage("Refine")
        first, slope = best, slope_of([t for t in trials if t.family == best.family], steer)
        for name in CHOICES:
            moved = True
            while moved:
                start = best
                for family in self._neighbours(best.family, name):
                    if all(t.family != family for t in trials):
                        found = self._challenge(family, best, slope, steer)
                        trials = [*trials, *found]
                        best = min([best, *found], key=lambda t: _rank(t, best, judge))
                moved = best is not start
                if moved:
                    self.notes.append(f"Refined by {name}: {self._said(best, steer)}")
        if best is first:
            self.notes.append("Refined: no neighbour (codecs, ranks, block, q, seed) is better")
        return best, trials

    def _challenge(self, family: Family, best: Trial, slope: float, steer: Goal) -> list[Trial]:
        """One trial at the best's size; more only where that promises a gain."""
        measure = self._on(CALIBRATION)
        first = approach(family, steer, measure, best.size, 1)
        promises = expected_cost(first, steer, slope) < GAIN * steer.cost(best.point) or not steer.fits(best.point)
        if family.axis is None or not promises:
            return first
        return first + approach(family, steer, measure, crossing(first, steer), REFINE_ROUNDS)

    def _neighbours(self, family: Family, name: str) -> Iterator[Family]:
        """The family with another value of one setting, nearest values first; none where it is settled."""
        settings, choices = dict(family.settings), CHOICES[name]
        own = settings.get(name) if name != "q" else family.q if "seed" in settings else None
        if name in self.settled or own not in choices:
            return
        at = choices.index(own)
        near = sorted((abs(i - at), i) for i in range(len(choices)) if 0 < abs(i - at) <= 2)
        yield from (family.but(name, choices[i]) for _, i in near)

    def _confirm(self, best: Trial, trials: list[Trial], steer: Goal) -> Found:
        """Measure on text that the search did not see; where that misses, aim lower and try again."""
        self.stage("Confirm")
        allowed = self.tolerance.goal(self.bases(HELD_OUT))
        tries = [(best, self.measure(best.candidate, HELD_OUT))]
        reached = steer.fits(best.point)
        while reached and not allowed.fits(tries[-1][1]) and len(tries) <= TIGHTENINGS:
            trial, held_out = tries[-1]
            self.notes.append(f"Held-out text: {_error(held_out, allowed)}, over the limit; aimed lower")
            lower = self._lower(trial, held_out, allowed, steer)
            steer = lower
            found = approach(
                trial.family,
                lower,
                self._on(CALIBRATION),
                crossing([*trials, trial], lower),
                REFINE_ROUNDS,
            )
            following = best_of(found, lower) or max(found, key=lambda t: t.size)
            if following.candidate == trial.candidate:
                break
            tries.append((following, self.measure(following.candidate, HELD_OUT)))
        fitting = [each for each in tries if allowed.fits(each[1])]
        trial, held_out = min(fitting or tries, key=lambda each: allowed.excess(each[1]) if not fitting else 0)
        self.notes.append(f"Held-out text: {_error(held_out, allowed)}, {'within' if fitting else 'over'} the limit")
        return Found(trial, held_out, allowed, bool(fitting), tuple(self.notes))

    def _lower(self, trial: Trial, held_out: Point, allowed: Goal, steer: Goal) -> Goal:
        if steer.error != allowed.error:
            return Goal(steer.error, SCORE_STEP * min(steer.allowed, trial.point.kl))
        error: float = getattr(trial.point, steer.error)
        return Goal(steer.error, SAFETY * min(steer.allowed, error) / max(allowed.excess(held_out), 1))

    def _on(self, text: str) -> Callable[[Candidate], Point]:
        return lambda candidate: self.measure(candidate, text)

    def _said(self, trial: Trial, goal: Goal) -> str:
        return f"{trial.candidate.label}: {trial.point.bytes:,} bytes, {_error(trial.point, goal)}"


def _surely(trial: Trial, goal: Goal) -> float:
    """What a family costs at the most where its trial fits, else what it is expected to."""
    return goal.cost(trial.point) if goal.fits(trial.point) else expected_cost([trial], goal)


def _rank(trial: Trial, best: Trial, goal: Goal) -> tuple[bool, float]:
    """What fits comes first, then what costs less; what does not, by its excess. The best has an advantage."""
    figure = goal.cost(trial.point) if goal.fits(trial.point) else goal.excess(trial.point)
    return not goal.fits(trial.point), figure * (GAIN if trial is best else 1)


def _error(point: Point, goal: Goal) -> str:
    """The error and what is allowed, in the user's terms."""
    match goal.error:
        case "kl":
            return f"KL {point.kl:.4g} of {goal.allowed:.4g}"
        case "disagreement":
            return f"top-1 agreement {point.agreement:.2%} of {1 - goal.allowed:.2%}"
        case "mistakes":
            return f"score {point.score:.1%} of {1 - goal.allowed:.1%}"
    return f"KL {point.kl:.4g}"


def _amount(cost: float, goal: Goal) -> str:
    if cost == float("inf"):
        return "out of reach"
    return f"KL {cost:.2g}" if goal.grows else f"{cost / 1e6:.2f} MB"
