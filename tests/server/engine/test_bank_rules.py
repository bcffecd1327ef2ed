"""The rules of residency, counted in steps: no thread, no clock; every load takes one step of its own."""

from collections import Counter
from collections.abc import Sequence

import pytest
from engine_variants import version
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.delta_store.errors import RequestRefused
from deltaserve.server.engine.requests import Version
from deltaserve.server.engine.slots import Slots, Ticket
from deltaserve.server.engine.wrapped import Fitted

BYTES = 10


class Shelf:
    """Stands for the wrapped model."""

    def __init__(self) -> None:
        self.slots: set[int] = set()

    def install(self, slot: int, fitted: Fitted) -> None:
        assert slot not in self.slots
        self.slots.add(slot)

    def clear(self, slot: int) -> None:
        self.slots.remove(slot)


class Steps:
    """Requests of counted length on counted slots. ``waits`` are the steps between arrival and slot, by request."""

    def __init__(self, slots: int, budget: int = 10**6) -> None:
        self.shelf = Shelf()
        self.evicted: Counter[str] = Counter()
        self.slots = Slots(self.shelf, slots, budget, lambda name: self.evicted.update([name]))  # type: ignore[arg-type]
        self.now = 0
        self.loads: Counter[str] = Counter()
        self.waits: list[int] = []
        self._waiting: list[tuple[Ticket, int, int]] = []
        self._running: list[tuple[Ticket, int]] = []

    def ask(self, on: Version | str, length: int) -> Ticket:
        """A request that runs for ``length`` steps."""
        ticket = self.slots.hold(version(on) if isinstance(on, str) else on)
        self._waiting.append((ticket, self.now, length))
        return ticket

    def step(self) -> list[str]:
        """Load one version, run all requests once; returns whose ended."""
        if (loading := self.slots.loading) is not None:
            size = 2 * BYTES if "big" in loading.version.variant else BYTES
            if self.slots.place(loading, Fitted({}, size, 64, None)):
                self.loads[loading.version.variant] += 1
            else:
                self.slots.advance()
        for entry in [entry for entry in self._waiting if entry[0].future.done()]:
            self._waiting.remove(entry)
            self.waits.append(self.now - entry[1])
            self._running.append((entry[0], self.now + entry[2]))
        self.now += 1
        over = [entry for entry in self._running if entry[1] <= self.now]
        for entry in over:
            self._running.remove(entry)
            self.slots.let_go(entry[0])
        return [ticket.version.variant for ticket, _ in over]

    def finish(self, bound: int = 10**4) -> None:
        while self._waiting or self._running:
            assert self.now < bound
            self.step()


def bound(active: int, slots: int, longest: int) -> int:
    """What docs/residency.md promises: steps that a request waits at most."""
    return 2 * longest * -(-active // slots) + active


@pytest.mark.parametrize("slots", [1, 2, 4, 16])
def test_d_more_variants_than_slots_twice_as_many_are_all_served_in_time(slots: int) -> None:
    """Every variant has two requests at any time, so nobody's slot is ever given up for lack of work."""
    longest, names = 12, [f"v{i}" for i in range(2 * slots)]
    it, served = Steps(slots), Counter[str]()
    for i, name in enumerate(names * 2):
        it.ask(name, 1 + i * 7 % longest)
    for turn in range(60 * longest):
        for i, name in enumerate(it.step()):
            served[name] += 1
            it.ask(name, 1 + (turn + i * 5) % longest)
    assert min(served[name] for name in names) > 0.4 * max(served.values())
    assert max(it.waits) <= bound(len(names), slots, longest)


@given(
    slots=st.integers(1, 4),
    arrivals=st.lists(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 9)), max_size=3), max_size=60),
)
@settings(max_examples=200, deadline=None)
def test_d_more_variants_than_slots_whoever_comes_when(
    slots: int, arrivals: Sequence[Sequence[tuple[int, int]]]
) -> None:
    it = Steps(slots)
    for coming in arrivals:
        for name, length in coming:
            it.ask(f"v{name}", length)
        it.step()
    it.finish()
    assert len(it.waits) == sum(map(len, arrivals))
    assert max(it.waits, default=0) <= bound(8, slots, 9)


@pytest.mark.parametrize(("slots", "budget", "wanted"), [(1, 10**6, "b"), (2, 20, "big")], ids=["slots", "bytes"])
def test_d_more_variants_than_slots_a_flood_for_one_does_not_keep_another_out(
    slots: int, budget: int, wanted: str
) -> None:
    """Each request for a ends only after the next one began. Those that come while the first runs still pass."""
    longest = 10
    it = Steps(slots, budget)
    it.ask("a", longest)
    for _ in range(3):
        it.step()
    other, passing = it.ask(wanted, 1), it.ask("a", longest)
    assert passing.future.done()
    since = it.now
    while not other.future.done():
        assert it.now - since <= 2 * longest + 1  # and to load
        if it.now % 3 == 0:
            it.ask("a", longest)
        it.step()
    it.finish()
    assert it.loads["a"] == 2


def test_d_more_variants_than_slots_only_as_many_are_closed_as_places_are_needed() -> None:
    it = Steps(slots=3)
    for name in "abc":
        it.ask(name, 4)
    it.step()
    it.step()
    it.step()
    other = it.ask("d", 5)
    later = [it.ask(name, 50) for name in "abc"]
    for _ in range(4):
        it.step()
    latest = [it.ask(name, 5) for name in "abc"]
    assert [ticket.future.done() for ticket in later] == [True] * 3
    assert [ticket.future.done() for ticket in latest] == [False, True, True]  # a's place is the one
    it.finish()
    assert other.future.done()


def test_d_more_variants_than_slots_the_base_and_warm_ones_go_on_while_another_waits() -> None:
    it = Steps(slots=2)
    it.ask("a", 30)
    it.ask("b", 30)
    it.step()
    it.step()
    cold = it.ask("c", 1)
    warm = [it.ask(name, 1) for name in "ab" * 5]
    assert all(ticket.future.done() for ticket in warm)
    assert not cold.future.done()
    it.finish()


# Versions


V1, V2, V3 = (Version("v", f"{i}" * 64, "") for i in range(1, 4))


def test_d_same_name_new_weights_never_wait_for_the_old_ones_requests() -> None:
    it = Steps(slots=2, budget=2 * BYTES)
    old = it.ask(V1, 100)
    it.ask("other", 100)
    it.step()
    it.step()
    new = it.ask(V2, 100)
    it.step()
    assert new.future.done()  # in the spare slot, beyond the budget by the old one's bytes
    assert it.slots.used_bytes == 3 * BYTES
    newest = it.ask(V3, 100)
    it.step()
    assert not newest.future.done()  # one spare slot, one replacement at a time
    it.slots.let_go(old)
    it.step()
    assert newest.future.done()
    assert it.evicted == {"v": 1}


def test_d_same_name_new_weights_and_back_again() -> None:
    it = Steps(slots=2)
    for asked in (V1, V2, V1):
        it.ask(asked, 1)
        it.finish()
    assert it.loads["v"] == 2
    it.ask("other", 1)
    it.finish()
    assert list(it.slots.residents) == [V1.digest, version("other").digest]  # the outdated one makes room


def test_d_same_name_new_weights_forgotten_ones_go_with_their_last_request() -> None:
    it = Steps(slots=4)
    first, second = it.ask(V1, 100), it.ask(V1, 100)
    it.step()
    it.ask(V2, 100)
    it.step()
    it.slots.forget(V1.digest)
    assert len(it.shelf.slots) == 2
    it.slots.let_go(first)
    assert len(it.shelf.slots) == 2
    it.slots.let_go(second)
    assert list(it.slots.residents) == [V2.digest]


def test_d_remove_while_busy_frees_the_slot_with_the_last_request() -> None:
    it = Steps(slots=1)
    running = it.ask("a", 100)
    it.step()
    waiting = it.ask("b", 1)
    it.slots.forget(version("a").digest)
    it.slots.forget(version("b").digest)  # also of one that is not here yet: whoever waits for it is served
    assert len(it.shelf.slots) == 1
    it.slots.let_go(running)
    it.step()
    assert waiting.future.done()
    it.slots.let_go(waiting)
    assert it.shelf.slots == set()
    assert (it.slots._current, it.slots._forgotten) == ({}, set())


# Pins


def test_a_pin_follows_its_name_to_new_versions() -> None:
    it = Steps(slots=2)
    it.slots.pin("v")
    for asked in (V1, V2):
        it.ask(asked, 1)
        it.finish()
        for name in "abcd":
            it.ask(name, 1)
            it.finish()
        assert asked.digest in it.slots.residents
    assert V1.digest not in it.slots.residents  # the pin has left it
    it.slots.unpin("v")
    for name in "ab":
        it.ask(name, 1)
        it.finish()
    assert V2.digest not in it.slots.residents


def test_pins_leave_a_slot_and_bytes_to_others() -> None:
    it = Steps(slots=2, budget=2 * BYTES)
    it.slots.pin("a")
    it.slots.pin("a")
    with pytest.raises(RequestRefused, match=r"'b' cannot be pinned: of 2 slots, 1 .*raise bank_slots"):
        it.slots.pin("b")
    it.ask("a", 1)
    it.finish()
    it.ask("big", 1)
    with pytest.raises(RequestRefused, match=r"'big' needs 20 .*have 20, of which pinned variants take 10"):
        it.step()


def test_a_pinned_variant_is_never_closed_for_others() -> None:
    it = Steps(slots=2)
    it.slots.pin("a")
    it.ask("a", 3)
    it.ask("b", 3)
    for _ in range(3):
        it.step()
    cold = it.ask("c", 1)
    for _ in range(8):
        assert it.ask("a", 3).future.done()
        it.ask("b", 3)
        it.step()
    assert cold.future.done()
    it.finish()
