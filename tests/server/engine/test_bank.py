"""Slots, bytes, holders and the queue of the bank, with a model that only notes what is in which slot."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from engine_variants import version
from running_server import wait_until

from deltaserve.delta_store.errors import ArtifactError, CorruptArtifact, RequestRefused
from deltaserve.server.engine.bank import Bank
from deltaserve.server.engine.requests import Version
from deltaserve.server.engine.slots import Ticket
from deltaserve.server.engine.wrapped import Fitted

WAIT = 5


class Shelf:
    """Stands for the wrapped model, whose layers have their own tests."""

    def __init__(self) -> None:
        self.slots: dict[int, Fitted] = {}

    def install(self, slot: int, fitted: Fitted) -> None:
        assert slot not in self.slots
        self.slots[slot] = fitted

    def clear(self, slot: int) -> None:
        del self.slots[slot]


class Loads:
    """Loads versions of 10 bytes ('big' ones 25), counts it, and fails or waits where told to."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.broken: dict[str, Exception] = {}

    def __call__(self, wanted: Version) -> Fitted:
        self.counts[wanted.variant] = self.counts.get(wanted.variant, 0) + 1
        assert self.gate.wait(WAIT)
        if wanted.variant in self.broken:
            raise self.broken[wanted.variant]
        return Fitted({}, 25 if "big" in wanted.variant else 10, 64, None)


@contextmanager
def bank(slots: int = 2, budget: int = 1000) -> Iterator[tuple[Bank, Loads, Shelf]]:
    loads, shelf = Loads(), Shelf()
    bank = Bank(shelf, slots, budget, loads)  # type: ignore[arg-type]
    try:
        yield bank, loads, shelf
    finally:
        loads.gate.set()
        bank.close()


def held(bank: Bank, *names: str) -> list[Ticket]:
    tickets = [bank.hold(version(name)) for name in names]
    for ticket in tickets:
        ticket.future.result(WAIT)
    return tickets


def test_a_cold_version_is_loaded_once_for_all_who_wait() -> None:
    with bank() as (it, loads, shelf):
        tickets = held(it, "a", "a", "a")
        assert loads.counts == {"a": 1}
        assert len({ticket.future.result().slot for ticket in tickets}) == 1 == len(shelf.slots)
        assert it.holders == {version("a").digest: 3}


def test_the_longest_unused_makes_room_and_a_held_one_never_does() -> None:
    with bank(slots=2) as (it, loads, _):
        a, b = held(it, "a", "b")
        it.let_go(a)
        it.let_go(b)
        (a,) = held(it, "a")
        (c,) = held(it, "c")
        assert set(it.holders) == {version("a").digest, version("c").digest}
        assert loads.counts == {"a": 1, "b": 1, "c": 1}
        it.let_go(a)
        it.let_go(c)


def test_the_byte_budget_makes_room_too() -> None:
    with bank(slots=9, budget=30) as (it, _, shelf):
        a, b, c = held(it, "a", "b", "c")
        assert it.used_bytes == 30
        for ticket in (a, b, c):
            it.let_go(ticket)
        held(it, "big")
        assert it.used_bytes == 25
        assert len(shelf.slots) == 1


def test_a_version_larger_than_all_memory_is_refused() -> None:
    with bank(budget=20) as (it, _, _shelf):
        with pytest.raises(RequestRefused, match=r"'big' needs 25 bytes.*have 20"):
            held(it, "big")
        held(it, "a")


def test_a_hint_loads_what_nobody_waits_for() -> None:
    with bank(slots=1) as (it, loads, _):
        it.prefetch(version("a"))
        wait_until(lambda: it.state(version("a").digest) == "resident")
        held(it, "a")
        assert (loads.counts, it.holders) == ({"a": 1}, {version("a").digest: 1})


def test_a_hint_that_fails_or_never_fits_leaves_nothing_behind() -> None:
    with bank(slots=2, budget=30) as (it, loads, shelf):
        loads.broken = {"bad": CorruptArtifact("bad is damaged")}
        held(it, "a")
        it.prefetch(version("bad"))
        it.prefetch(version("big"))  # its bytes would be there only if a's request ended
        wait_until(lambda: it.waiting == 0)
        assert list(shelf.slots.values()) == [shelf.slots[next(iter(shelf.slots))]]
        assert it.state(version("big").digest) is None
        held(it, "b")


def test_a_pinned_variant_is_loaded_and_stays() -> None:
    with bank(slots=2) as (it, loads, _):
        ticket = it.pin(version("a"))
        ticket.future.result(WAIT)
        it.let_go(ticket)
        for name in "bcd":
            it.let_go(held(it, name)[0])
        held(it, "a")
        assert loads.counts["a"] == 1
        assert it.pinned == {"a"}


def test_d_more_variants_than_slots_wait_in_order_of_arrival() -> None:
    with bank(slots=1) as (it, _, _shelf):
        (a,) = held(it, "a")
        b, c, more_b = (it.hold(version(name)) for name in "bcb")
        assert it.waiting == 3
        it.let_go(a)
        b.future.result(WAIT)
        more_b.future.result(WAIT)
        assert not c.future.done()
        it.let_go(b)
        it.let_go(more_b)
        assert c.future.result(WAIT).digest == version("c").digest


def test_d_more_variants_than_slots_versions_in_memory_are_not_held_up_by_a_load() -> None:
    with bank(slots=2) as (it, loads, _):
        held(it, "a")
        loads.gate.clear()
        slow = it.hold(version("b"))
        for _ in range(100):
            held(it, "a")
        assert not slow.future.done()
        loads.gate.set()
        slow.future.result(WAIT)


def test_a_damaged_artifact_fails_its_own_requests_only_and_is_not_tried_again_by_itself() -> None:
    with bank(slots=1) as (it, loads, _):
        loads.broken = {"bad": CorruptArtifact("bad is damaged"), "odd": OSError("no such disk")}
        loads.gate.clear()
        bad, again, good, odd = (it.hold(version(name)) for name in ("bad", "bad", "good", "odd"))
        loads.gate.set()
        for ticket in (bad, again):
            with pytest.raises(CorruptArtifact, match="bad is damaged"):
                ticket.future.result(WAIT)
        it.let_go(held(it, "good")[0])
        good.future.result(WAIT)
        it.let_go(good)
        with pytest.raises(ArtifactError, match=r"'odd'.*cannot be loaded: no such disk"):
            odd.future.result(WAIT)
        assert loads.counts == {"bad": 1, "good": 1, "odd": 1}


def test_f_client_gone_while_it_waits_leaves_nothing_behind() -> None:
    with bank(slots=1) as (it, _, _shelf):
        (a,) = held(it, "a")
        gone = it.hold(version("b"))
        assert gone.future.cancel()
        it.let_go(gone)
        assert it.waiting == 0
        it.let_go(a)
        assert it.holders == {version("a").digest: 0}
        (granted,) = held(it, "b")  # granted, but the client is gone before it looks
        it.let_go(granted)
        assert it.holders == {version("b").digest: 0}


def test_d_remove_while_busy_frees_the_memory_with_the_last_request() -> None:
    with bank() as (it, _, shelf):
        first, second = held(it, "a", "a")
        it.forget(version("a").digest)
        it.let_go(first)
        assert len(shelf.slots) == 1
        it.let_go(second)
        assert shelf.slots == {}
        assert it.used_bytes == 0
        it.forget(version("a").digest)
        (idle,) = held(it, "b")
        it.let_go(idle)
        it.forget(version("b").digest)
        assert shelf.slots == {}


def test_d_same_name_new_weights_are_another_version() -> None:
    with bank() as (it, loads, _):
        old, new = it.hold(version("v", "1" * 64)), it.hold(version("v", "2" * 64))
        assert old.future.result(WAIT).slot != new.future.result(WAIT).slot
        assert loads.counts == {"v": 2}
