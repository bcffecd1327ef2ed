"""Who has a slot, and who gets the next one: the rules of residency, free of threads and clocks.

There are ``slots`` places and a spare, under a byte budget. A request holds its version's slot until it is over; a
version that nobody holds stays until its place is needed, the longest unused first.

*Waiting.* Requests are numbered as they arrive. A version that needs another one's place closes the resident that is
there longest of those that only later requests hold: whoever asks for that one now queues behind. So a version waits
for requests that ran when it came, and for those that came while they ran, but for no others.

*Replacing.* The version that a name was last asked for is its current one. Idle ones that are nobody's current version
are the first to be evicted; those that were forgotten go with their last request. A successor may take the spare slot,
and exceed the budget by what its predecessor takes, so that a new version never waits for the old one's requests.

*Pins* belong to names: the current version of a pinned name is never evicted.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from deltaserve.delta_store.errors import RequestRefused
from deltaserve.server.engine.requests import Version
from deltaserve.server.engine.wrapped import Fitted

SPARE = 1
"""Slots beyond those counted, for a version whose predecessor still runs."""


class Places(Protocol):
    """Where versions go: the model, or those of all processes."""

    def install(self, slot: int, fitted: Fitted) -> None: ...
    def clear(self, slot: int) -> None: ...


@dataclass(slots=True, eq=False)
class Resident:
    """A version in a slot, and the numbers of the requests that hold it.

    ``variant`` is the name it was loaded for; of two residents, the one with the smaller ``number`` came first.
    """

    digest: str
    slot: int
    fitted: Fitted
    variant: str
    number: int
    holders: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Ticket:
    """A request's place in the queue; ``future`` gives the resident, or the error that kept it out.

    A ``hint`` only wants the version to be there: it holds nothing, and nobody queues behind it.
    """

    version: Version
    number: int
    hint: bool = False
    future: "Future[Resident]" = field(default_factory=Future)


@dataclass(slots=True, eq=False)
class Loading:
    """A version on its way into a slot; ``fitted`` once it only waits for bytes."""

    version: Version
    slot: int
    fitted: Fitted | None = None


class Slots:
    """Every method may change who has what: one thread at a time. What is to be loaded next stands in ``loading``.

    ``evicted`` is told the name of each version that leaves.
    """

    def __init__(self, model: Places, slots: int, budget_bytes: int, evicted: Callable[[str], None]) -> None:
        self._evicted = evicted
        self._model, self._slots, self._budget_bytes = model, slots, budget_bytes
        self._free = list(range(slots + SPARE))
        self._numbers = count()
        self._current: dict[str, str] = {}
        self._forgotten: set[str] = set()
        self.pinned: set[str] = set()
        self.residents: OrderedDict[str, Resident] = OrderedDict()
        self.waiting: list[Ticket] = []
        self.loading: Loading | None = None

    @property
    def used_bytes(self) -> int:
        """Bytes of the residents."""
        return sum(resident.fitted.nbytes for resident in self.residents.values())

    def hold(self, version: Version, *, hint: bool = False) -> Ticket:
        """Ask for a version; every ticket is later given to ``let_go``, unless its future fails or is cancelled."""
        self._current[version.variant] = version.digest
        self._forgotten.discard(version.digest)
        ticket = Ticket(version, next(self._numbers), hint)
        self.waiting.append(ticket)
        self.advance()
        return ticket

    def let_go(self, ticket: Ticket) -> None:
        """The request is over, or gave up waiting."""
        if ticket in self.waiting:
            self.waiting.remove(ticket)
        elif not ticket.future.cancelled() and ticket.future.exception() is None:
            ticket.future.result().holders.discard(ticket.number)
        self.advance()

    def forget(self, digest: str) -> None:
        """Nobody will ask for this version any more."""
        if digest in self.residents or any(ticket.version.digest == digest for ticket in self.waiting):
            self._forgotten.add(digest)
        self._current = {name: current for name, current in self._current.items() if current != digest}
        self.advance()

    def pin(self, name: str) -> None:
        """Never evict this variant's current version. Raises RequestRefused where nobody else would have a slot."""
        if len(self.pinned | {name}) >= self._slots:
            raise RequestRefused(
                f"{name!r} cannot be pinned: of {self._slots} slots, {len(self.pinned)} are taken by pinned variants, "
                "and one must be left for all others; unpin one or raise bank_slots"
            )
        self.pinned.add(name)

    def unpin(self, name: str) -> None:
        """Let its versions be evicted like all others."""
        self.pinned.discard(name)
        self.advance()

    def place(self, loading: Loading, fitted: Fitted) -> bool:
        """Fill the slot, if there is room in the budget by now: no running step has rows of it.

        Raises RequestRefused for a version that will never fit.
        """
        self._check_size(loading.version, fitted)
        loading.fitted = fitted
        self._evict_for(self._missing_bytes(loading))
        if self._missing_bytes(loading) > 0:
            return False
        digest = loading.version.digest
        self._model.install(loading.slot, fitted)
        self.residents[digest] = Resident(digest, loading.slot, fitted, loading.version.variant, next(self._numbers))
        self.loading = None
        self.advance()
        return True

    def drop(self, loading: Loading) -> list[Ticket]:
        """Give up on a load; returns the tickets that waited for it."""
        digest = loading.version.digest
        lost = [ticket for ticket in self.waiting if ticket.version.digest == digest]
        self.waiting = [ticket for ticket in self.waiting if ticket.version.digest != digest]
        self._free.append(loading.slot)
        self.loading = None
        self.advance()
        return lost

    def is_wanted(self, loading: Loading) -> bool:
        """Whether a request still waits for it."""
        return any(t.version.digest == loading.version.digest and not t.hint for t in self.waiting)

    def advance(self) -> None:
        """Give tickets for what is resident; the first of the others begins to load, hints last."""
        if self.loading is not None and self.loading.fitted is not None:
            self._evict_for(self._missing_bytes(self.loading))
        while self._gives_any():
            pass  # whoever holds something now may let others pass
        self._tidy()

    def _gives_any(self) -> bool:
        closed, gives = dict(self._closed()), False
        for ticket in sorted(self.waiting, key=lambda ticket: ticket.hint):
            resident = self.residents.get(ticket.version.digest)
            if resident is not None:
                if ticket.number <= closed.get(resident.digest, ticket.number):
                    self._give(ticket, resident)
                    gives = True
            elif self.loading is None and (slot := self._take_slot(ticket.version)) is not None:
                self.loading = Loading(ticket.version, slot)
        return gives

    def _give(self, ticket: Ticket, resident: Resident) -> None:
        self.waiting.remove(ticket)
        if ticket.future.set_running_or_notify_cancel():
            if not ticket.hint:
                resident.holders.add(ticket.number)
            self.residents.move_to_end(resident.digest)
            ticket.future.set_result(resident)

    def _closed(self) -> Iterator[tuple[str, int]]:
        """Residents that make room, with the number of the request that needs their place."""
        pinned = self._pinned_digests()
        busy = [one for digest, one in self.residents.items() if one.holders and digest not in pinned]
        candidates = [*self._idle(), *sorted(busy, key=lambda one: one.number)]
        for number, missing_bytes in self._needs():
            freed = 0
            while freed == 0 or freed < missing_bytes:
                chosen = next((one for one in candidates if min(one.holders, default=number + 1) > number), None)
                if chosen is None:
                    break
                candidates.remove(chosen)
                freed += chosen.fitted.nbytes
                yield chosen.digest, number

    def _needs(self) -> Iterator[tuple[int, int]]:
        """Who can only come in when others leave, by age: the number of its first request, and bytes that it lacks."""
        firsts: dict[str, int] = {}
        for ticket in self.waiting:
            if not ticket.hint and ticket.version.digest not in self.residents:
                firsts.setdefault(ticket.version.digest, ticket.number)
        if (loading := self.loading) is not None:
            number = firsts.pop(loading.version.digest, None)
            if number is not None and loading.fitted is not None:
                yield number, self._missing_bytes(loading)
        for number in list(firsts.values())[max(0, self._slots - self._in_use()) :]:
            yield number, 0

    def _take_slot(self, version: Version) -> int | None:
        """A slot for a version to be loaded, whose owner is evicted if nobody holds it."""
        if self._in_use() >= self._slots and (idle := next(self._idle(), None)) is not None:
            self._evict(idle)
        allowed = self._slots + (SPARE if self._predecessor(version) is not None else 0)
        return self._free.pop() if self._in_use() < allowed else None

    def _in_use(self) -> int:
        return len(self.residents) + (self.loading is not None)

    def _predecessor(self, version: Version) -> Resident | None:
        """A resident that had this name and is nobody's current version any more."""
        named = (one for one in self.residents.values() if one.variant == version.variant)
        return next((one for one in named if one.digest not in self._current.values()), None)

    def _missing_bytes(self, loading: Loading) -> int:
        assert loading.fitted is not None
        predecessor = self._predecessor(loading.version)
        beyond = predecessor.fitted.nbytes if predecessor is not None else 0
        return self.used_bytes + loading.fitted.nbytes - self._budget_bytes - beyond

    def _check_size(self, version: Version, fitted: Fitted) -> None:
        pinned = self._pinned_digests() - {self._current.get(version.variant, "")}
        pinned_bytes = sum(one.fitted.nbytes for digest, one in self.residents.items() if digest in pinned)
        if fitted.nbytes + pinned_bytes > self._budget_bytes:
            pins = f", of which pinned variants take {pinned_bytes}" if pinned_bytes else ""
            raise RequestRefused(
                f"Variant {version.variant!r} needs {fitted.nbytes} bytes of memory and all variants together have "
                f"{self._budget_bytes}{pins}; raise bank_bytes",
                param="model",
            )

    def _idle(self) -> Iterator[Resident]:
        """Residents that may be evicted: outdated ones first, then the longest unused."""
        pinned, current = self._pinned_digests(), set(self._current.values())
        idle = [one for digest, one in self.residents.items() if not one.holders and digest not in pinned]
        return iter(sorted(idle, key=lambda one: one.digest in current))

    def _pinned_digests(self) -> set[str]:
        return {self._current[name] for name in self.pinned if name in self._current}

    def _evict_for(self, missing_bytes: int) -> None:
        for idle in list(self._idle()):
            if missing_bytes <= 0:
                break
            missing_bytes -= idle.fitted.nbytes
            self._evict(idle)

    def _tidy(self) -> None:
        """Forgotten versions go when they are idle; so does somebody while the spare slot is taken."""
        for idle in [one for one in self._idle() if one.digest in self._forgotten]:
            self._evict(idle)
        while self._in_use() > self._slots and (longest := next(self._idle(), None)) is not None:
            self._evict(longest)

    def _evict(self, resident: Resident) -> None:
        del self.residents[resident.digest]
        self._model.clear(resident.slot)
        self._free.append(resident.slot)
        self._forgotten.discard(resident.digest)
        self._evicted(resident.variant)
        current = self._current.items()
        self._current = {n: digest for n, digest in current if digest != resident.digest or n in self.pinned}
