"""Which variants are in memory: fixed slots under a byte budget, filled on a thread of its own, shared by digest.

A request holds its variant's slot until it is over. A version that nobody holds stays until its place is needed, the
longest unused first. Requests for a cold version wait in order of arrival. Requests for versions in memory pass them,
but once ``PATIENCE`` have passed one that waits for a slot, they queue behind it: a busy variant cannot keep another
one out.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from deltaserve.delta_store.errors import ArtifactError, DeltaServeError, RequestRefused
from deltaserve.server.engine.requests import Version
from deltaserve.server.engine.wrapped import Fitted, WrappedModel

PATIENCE = 32


@dataclass(slots=True, eq=False)
class Resident:
    """A version in a slot, and how many requests hold it."""

    digest: str
    slot: int
    fitted: Fitted
    holders: int = 0


@dataclass(slots=True, eq=False)
class Ticket:
    """A request's place in the queue; ``future`` gives the resident, or the error that kept it out."""

    version: Version
    future: "Future[Resident]" = field(default_factory=Future)
    passed: int = 0


@dataclass(slots=True, eq=False)
class _Loading:
    version: Version
    slot: int
    fitted: Fitted | None = None


class Bank:
    """``load`` turns a version into what the layers keep; whatever it raises fails that version's requests alone."""

    def __init__(self, model: WrappedModel, slots: int, budget_bytes: int, load: Callable[[Version], Fitted]) -> None:
        self._model, self._load = model, load
        self._slots, self._budget_bytes = slots, budget_bytes
        self._free = list(range(slots))
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self._waiting: deque[Ticket] = deque()
        self._loading: _Loading | None = None
        self._unwanted: set[str] = set()
        self._closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="bank", daemon=True).start()

    @property
    def holders(self) -> dict[str, int]:
        """How many requests hold each version in memory, by digest."""
        with self._changed:
            return {digest: resident.holders for digest, resident in self._residents.items()}

    @property
    def used_bytes(self) -> int:
        """Bytes of the versions in memory."""
        with self._changed:
            return self._used_bytes()

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        with self._changed:
            return len(self._waiting)

    def hold(self, version: Version) -> Ticket:
        """Ask for a version; every ticket is later given to ``let_go``, unless its future fails or is cancelled."""
        ticket = Ticket(version)
        with self._changed:
            self._unwanted.discard(version.digest)
            self._waiting.append(ticket)
            self._advance()
        return ticket

    def let_go(self, ticket: Ticket) -> None:
        """The request is over, or gave up waiting."""
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            elif not ticket.future.cancelled() and ticket.future.exception() is None:
                resident = ticket.future.result()
                resident.holders -= 1
                if not resident.holders and resident.digest in self._unwanted:
                    self._evict(resident)
            self._advance()

    def forget(self, digest: str) -> None:
        """Free the version's memory, now or when its last request is over."""
        with self._changed:
            resident = self._residents.get(digest)
            if resident is not None and resident.holders:
                self._unwanted.add(digest)
            elif resident is not None:
                self._evict(resident)
                self._advance()

    def close(self) -> None:
        """Stop the loading thread; nothing is loaded any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _advance(self) -> None:
        """Give tickets for what is in memory; the first of the others begins to load. Called with the lock held."""
        barred: Ticket | None = None
        for ticket in tuple(self._waiting):
            resident = self._residents.get(ticket.version.digest)
            if resident is not None:
                if barred is None or barred.passed < PATIENCE:
                    if barred is not None:
                        barred.passed += 1
                    self._give(ticket, resident)
            elif self._loading is None and (slot := self._take_slot()) is not None:
                self._loading = _Loading(ticket.version, slot)
            elif barred is None and self._is_barred(ticket):
                barred = ticket
        self._changed.notify_all()

    def _is_barred(self, ticket: Ticket) -> bool:
        """Whether only the end of other requests can make room for this one."""
        loading = self._loading
        if loading is None:
            return True
        return loading.fitted is not None and loading.version.digest == ticket.version.digest

    def _give(self, ticket: Ticket, resident: Resident) -> None:
        self._waiting.remove(ticket)
        if ticket.future.set_running_or_notify_cancel():
            resident.holders += 1
            self._residents.move_to_end(resident.digest)
            ticket.future.set_result(resident)

    def _take_slot(self) -> int | None:
        if not self._free and (idle := self._longest_idle()) is not None:
            self._evict(idle)
        return self._free.pop() if self._free else None

    def _longest_idle(self) -> Resident | None:
        return next((resident for resident in self._residents.values() if not resident.holders), None)

    def _evict(self, resident: Resident) -> None:
        del self._residents[resident.digest]
        self._unwanted.discard(resident.digest)
        self._model.clear(resident.slot)
        self._free.append(resident.slot)

    def _used_bytes(self) -> int:
        return sum(resident.fitted.nbytes for resident in self._residents.values())

    def _make_room(self, nbytes: int) -> bool:
        while self._used_bytes() + nbytes > self._budget_bytes:
            if (idle := self._longest_idle()) is None:
                return False
            self._evict(idle)
        return True

    def _run(self) -> None:
        while (loading := self._next()) is not None:
            try:
                fitted = self._load(loading.version)
                self._check_size(loading.version, fitted)
            except Exception as error:  # a broken artifact must not end the thread that loads all the others
                self._fail(loading, error)
            else:
                self._place(loading, fitted)

    def _next(self) -> _Loading | None:
        with self._changed:
            self._changed.wait_for(lambda: self._loading is not None or self._closed)
            return None if self._closed else self._loading

    def _check_size(self, version: Version, fitted: Fitted) -> None:
        if fitted.nbytes > self._budget_bytes:
            raise RequestRefused(
                f"Variant {version.variant!r} needs {fitted.nbytes} bytes of memory and all variants together have "
                f"{self._budget_bytes}; raise bank_bytes",
                param="model",
            )

    def _place(self, loading: _Loading, fitted: Fitted) -> None:
        """Wait until the bytes are there, then fill the slot: no running step has rows of it."""
        with self._changed:
            loading.fitted = fitted
            self._changed.wait_for(lambda: self._closed or self._make_room(fitted.nbytes))
            if self._closed:
                return
            self._model.install(loading.slot, fitted)
            self._residents[loading.version.digest] = Resident(loading.version.digest, loading.slot, fitted)
            self._loading = None
            self._advance()

    def _fail(self, loading: _Loading, error: Exception) -> None:
        version = loading.version
        if not isinstance(error, DeltaServeError):
            told = ArtifactError(
                f"Variant {version.variant!r} (artifact {version.digest[:12]}) cannot be loaded: {error}"
            )
            told.__cause__ = error
            error = told
        with self._changed:
            self._free.append(loading.slot)
            self._loading = None
            for ticket in [t for t in self._waiting if t.version.digest == version.digest]:
                self._waiting.remove(ticket)
                if ticket.future.set_running_or_notify_cancel():
                    ticket.future.set_exception(error)
            self._advance()
