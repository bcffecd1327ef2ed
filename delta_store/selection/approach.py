"""From a few trials of one family to the size at which its error is just what is allowed."""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, inf, isfinite, log

from deltaserve.delta_store.selection.candidate import NARROW, Candidate, Family
from deltaserve.delta_store.selection.journal import Point
from deltaserve.delta_store.selection.tolerance import Goal

CLOSE = 0.93
"""An error of this share of what is allowed is near enough: KL on text is known no better."""

AIM = 0.97
NOTHING = 1e-9
STEEPEST, FLATTEST = -1.5, -0.1
"""Of cost against error: with an error of 1 / size and some bytes that are always there it is between -1 and 0."""
STEEPNESS = (0.4, 3.0)
"""Error is about 1 / size: between these powers, whatever two trials beside each other say."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate of a family, and what it gave."""

    family: Family
    size: float
    candidate: Candidate
    point: Point


def approach(
    family: Family, goal: Goal, measure: Callable[[Candidate], Point], start: float, rounds: int
) -> list[Trial]:
    """At most ``rounds`` trials from ``start`` towards the goal: on a log-log line, inside what is bracketed."""
    size = family.rounded(start)
    candidate = family.at(size)
    first = Trial(family, size, candidate, measure(candidate))
    return further([first], goal, measure, rounds)


def further(trials: list[Trial], goal: Goal, measure: Callable[[Candidate], Point], rounds: int) -> list[Trial]:
    """The trials of one family, and those that follow them until there are ``rounds``."""
    trials = list(trials)
    while len(trials) < rounds and (size := _next_size(trials, goal)) is not None:
        candidate = trials[-1].family.at(size)
        trials.append(Trial(trials[-1].family, size, candidate, measure(candidate)))
    return trials


def best_of(trials: list[Trial], goal: Goal) -> Trial | None:
    """Of those that fit the one of least cost; None where none fits."""
    return min((t for t in trials if goal.fits(t.point)), key=lambda t: goal.cost(t.point), default=None)


def expected_cost(trials: list[Trial], goal: Goal, slope: float = -1.0) -> float:
    """What the family would cost at what is allowed, by the line through its trials nearest to it.

    ``slope`` is taken where there is one trial alone. Infinite where the family cannot get there.
    """
    near = _nearest(trials, goal)
    if not near:
        return inf
    if near[0].family.axis is None:
        return goal.cost(near[0].point) if goal.fits(near[0].point) else inf
    return exp(log(goal.cost(near[0].point)) - slope_of(trials, goal, slope) * _log_excess(near[0], goal))


def slope_of(trials: list[Trial], goal: Goal, otherwise: float = -1.0) -> float:
    """How the logarithm of the cost follows that of the error: negative."""
    near = _nearest(trials, goal)
    if len(near) < 2 or _log_excess(near[0], goal) == _log_excess(near[1], goal):
        return otherwise
    run = _log_excess(near[0], goal) - _log_excess(near[1], goal)
    slope = log(goal.cost(near[0].point) / goal.cost(near[1].point)) / run
    return max(STEEPEST, min(FLATTEST, slope)) if slope < 0 else otherwise


def crossing(trials: list[Trial], goal: Goal) -> float:
    """The size at which the error is expected to be just within what is allowed."""
    near = sorted(trials, key=lambda t: abs(_log_excess(t, goal)))[:2]
    excess = _log_excess(near[0], goal)
    if not isfinite(excess):
        return near[0].size * (4 if (excess > 0) != goal.grows else 0.25)
    slope = 1.0
    if len(near) == 2 and isfinite(other := _log_excess(near[1], goal)) and near[0].size != near[1].size:
        slope = abs((excess - other) / log(near[0].size / near[1].size))
    slope = min(max(slope, STEEPNESS[0]), STEEPNESS[1]) * (1 if goal.grows else -1)
    return near[0].size * exp((log(AIM) - excess) / slope)


def _nearest(trials: list[Trial], goal: Goal) -> list[Trial]:
    """The two whose error is nearest to what is allowed, of those that have one and a cost."""
    usable = [t for t in trials if isfinite(_log_excess(t, goal)) and goal.cost(t.point) > 0]
    return sorted(usable, key=lambda t: abs(_log_excess(t, goal)))[:2]


def _next_size(trials: list[Trial], goal: Goal) -> float | None:
    """Where to look next; None where that is near enough, or where there is nothing left between the trials."""
    last, family = trials[-1], trials[-1].family
    if family.axis is None or (goal.fits(last.point) and goal.excess(last.point) >= CLOSE):
        return None
    small = max((t.size for t in trials if goal.fits(t.point) == goal.grows), default=family.least)
    large = min((t.size for t in trials if goal.fits(t.point) != goal.grows), default=family.most)
    tried = {t.size for t in trials}
    guess = family.rounded(crossing(trials, goal))
    if guess <= small:
        guess = small if small not in tried else family.beside(small, up=True)
    elif guess >= large:
        guess = large if large not in tried else family.beside(large, up=False)
    known = any(abs(log(guess / size)) < log(NARROW) / 2 for size in tried)
    return guess if small <= guess <= large and not known else None


def _log_excess(trial: Trial, goal: Goal) -> float:
    """Infinite only where there is no way to what is allowed; no error at all counts as a billionth of it."""
    excess = goal.excess(trial.point)
    return log(max(excess, NOTHING)) if isfinite(excess) else inf
