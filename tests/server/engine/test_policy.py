"""When a variant is swapped in and out: decided by what swaps and deltas were measured to cost."""

from types import SimpleNamespace
from typing import Any

import pytest

from deltaserve.delta_store.errors import EngineDown
from deltaserve.server.engine import policy as module
from deltaserve.server.engine.policy import COMPARED_STEPS, SHARE, SWAP_SECONDS_A_BYTE, Policy
from deltaserve.server.engine.wrapped import Fitted

STEP = 0.1
SWAP = 0.1
PATIENCE = round(SWAP / (STEP * SHARE))
"""Steps after which deltas have cost as much as swapping in and out will."""


class Weights:
    """Stands for what swaps, on a clock of its own: each swap takes ``seconds``."""

    def __init__(self) -> None:
        self.now, self.seconds = 0.0, SWAP / 2
        self.inside: Fitted | None = None
        self.broken = False
        self.restored = 0

    def swap_in(self, fitted: Fitted, slot: int) -> None:
        assert self.inside is None
        self.now += self.seconds
        if self.broken:
            raise RuntimeError("the power went")
        self.inside = fitted

    def swap_out(self) -> None:
        assert self.inside is not None
        self.now += self.seconds
        if self.broken:
            raise RuntimeError("the power went")
        self.inside = None

    def restore(self) -> None:
        self.restored += 1
        self.inside = None


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> Weights:
    weights = Weights()
    monkeypatch.setattr(module, "perf_counter", lambda: weights.now)
    return weights


def policy(weights: Weights, kind: str = "auto", room: int = 10**9, resident: bool = True) -> Policy:
    return Policy(kind, weights, room=lambda: room, is_resident=lambda digest: resident)  # type: ignore[arg-type]


def job(owner: str, swap_s: float = SWAP) -> Any:
    fitted = Fitted({}, 0, 64, None, overwrites=round(swap_s / SWAP_SECONDS_A_BYTE)) if owner else None
    return SimpleNamespace(digest=owner, fitted=fitted, slot=0)


def run(policy: Policy, owners: str, steps: int = 1, seconds: float = STEP) -> list[bool]:
    """Steps of a request of each owner, a letter each; ``-`` is the base."""
    jobs = [job(owner.strip("-")) for owner in owners]
    swapped = []
    for _ in range(steps):
        swapped.append(policy.before_step(jobs))
        policy.after_step(len(jobs), seconds)
    return swapped


def test_a_variant_alone_is_swapped_in_once_its_deltas_have_cost_as_much_as_the_swap(weights: Weights) -> None:
    it = policy(weights)
    assert run(it, "aa", PATIENCE + 5) == [False] * PATIENCE + [True] * 5
    assert (it.swapped, it.swaps, it.swap_seconds) == ("a", 1, SWAP / 2)
    assert run(it, "a", 100) == [True] * 100
    assert it.swaps == 1


@pytest.mark.parametrize("other", ["-", "b", "ab", "a-"])
def test_it_is_out_before_a_step_with_anybody_else(weights: Weights, other: str) -> None:
    it = policy(weights)
    run(it, "a", PATIENCE + 1)
    assert weights.inside is not None
    assert run(it, other) == [False]
    assert weights.inside is None
    assert it.swapped == ""
    assert run(it, "a", PATIENCE) == [False] * PATIENCE
    assert run(it, "a") == [True]


def test_taking_turns_faster_than_a_swap_pays_never_swaps(weights: Weights) -> None:
    it = policy(weights)
    for _ in range(50):
        assert not any(run(it, "a", PATIENCE) + run(it, "b", PATIENCE) + run(it, "-", 3) + run(it, "ab", 3))
    assert it.swaps == 0


def test_a_swap_that_was_slow_is_thought_over_for_longer(weights: Weights) -> None:
    it = policy(weights)
    weights.seconds = 3 * SWAP / 2
    run(it, "a", PATIENCE + 1)
    run(it, "-")
    assert run(it, "a", 3 * PATIENCE + 1) == [False] * 3 * PATIENCE + [True]


def test_deltas_that_cost_more_are_swapped_in_sooner(weights: Weights) -> None:
    it = policy(weights)
    run(it, "a", PATIENCE, STEP)
    run(it, "a", COMPARED_STEPS, STEP * 0.75)
    run(it, "-")
    share = (SHARE + 0.25) / 2
    assert run(it, "a", PATIENCE).index(True) == max(-(-SWAP // (STEP * share)), COMPARED_STEPS)
    run(it, "-")
    for _ in range(9):  # now they cost nothing, so the share halves each time, down to the least
        run(it, "a", 10 * PATIENCE)
        run(it, "-")
    assert run(it, "a", 20 * PATIENCE).index(True) > 5 * PATIENCE


def test_a_comparison_needs_batches_of_one_size(weights: Weights) -> None:
    it = policy(weights)
    run(it, "a", PATIENCE + 1)
    run(it, "aa", 3 * COMPARED_STEPS, STEP / 100)
    assert it._costs["a"].share == SHARE


def test_policy_swap_swaps_at_once_and_mixed_never(weights: Weights) -> None:
    assert run(policy(weights, "swap"), "a", 2) == [True, True]
    assert run(Policy("mixed", None, lambda: 10**9, lambda digest: True), "a", 100) == [False] * 100


def test_no_room_for_the_copy_no_swap(weights: Weights) -> None:
    assert not any(run(policy(weights, "swap", room=1000), "a", 100))


def test_a_variant_without_anything_to_swap_runs_on(weights: Weights) -> None:
    it = policy(weights)
    jobs = [job("a", swap_s=0)]
    for _ in range(100):
        assert not it.before_step(jobs)
        it.after_step(1, STEP)


@pytest.mark.parametrize("resident", [True, False])
def test_an_idle_engine_keeps_the_weights_only_of_what_is_in_memory(weights: Weights, resident: bool) -> None:
    it = policy(weights, "swap", resident=resident)
    run(it, "a")
    it.idle()
    it.idle()
    assert it.swapped == ("a" if resident else "")


@pytest.mark.parametrize("way", ["in", "out"])
def test_after_a_swap_that_failed_nothing_is_swapped(weights: Weights, way: str) -> None:
    it = policy(weights, "swap")
    if way == "out":
        run(it, "a")
    weights.broken = True
    assert run(it, "a" if way == "in" else "-") == [False]
    assert weights.restored == 1
    assert "the power went" in (it.failure or "")
    weights.broken = False
    assert run(it, "b", 5) == [False] * 5


def test_a_base_that_is_lost_stops_the_step(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise EngineDown("lost")

    weights.broken = True
    monkeypatch.setattr(weights, "restore", lost)
    with pytest.raises(EngineDown, match="lost"):
        run(policy(weights, "swap"), "a")
