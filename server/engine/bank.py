"""The variants in memory: shared by digest, loaded on a thread of its own, once for all who wait (rules: slots.py)."""

import asyncio
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Literal

from deltaserve.delta_store.errors import ArtifactError, DeltaServeError
from deltaserve.server.engine.reports import Reports, ResidentVariant
from deltaserve.server.engine.requests import Version
from deltaserve.server.engine.slots import Loading, Places, Slots, Ticket
from deltaserve.server.engine.wrapped import Fitted

Tier = Literal["resident", "loading", "host", "store"]


class Bank:
    """``load`` turns a version into what the layers keep; whatever it raises fails that version's requests alone.

    ``model`` has places for ``slots`` and the spare one.
    """

    def __init__(self, model: Places, slots: int, budget_bytes: int, load: Callable[[Version], Fitted]) -> None:
        self.reports = Reports()
        self._slots, self._load = Slots(model, slots, budget_bytes, self._report_evicted), load
        self._closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="bank", daemon=True).start()

    @property
    def holders(self) -> dict[str, int]:
        """How many requests hold each version in memory, by digest."""
        with self._changed:
            return {digest: len(resident.holders) for digest, resident in self._slots.residents.items()}

    @property
    def residents(self) -> tuple[ResidentVariant, ...]:
        """The versions in memory."""
        with self._changed:
            residents = self._slots.residents.values()
            return tuple(ResidentVariant(r.variant, r.digest, r.fitted.nbytes, len(r.holders)) for r in residents)

    @property
    def used_bytes(self) -> int:
        """Bytes of the versions in memory."""
        with self._changed:
            return self._slots.used_bytes

    @property
    def waiting(self) -> int:
        """Requests without a slot, and hints that nothing was done about yet."""
        with self._changed:
            return len(self._slots.waiting)

    @property
    def pinned(self) -> frozenset[str]:
        """Names of the variants whose current version is never evicted."""
        with self._changed:
            return frozenset(self._slots.pinned)

    def state(self, digest: str) -> Literal["resident", "loading"] | None:
        """Whether a version is in memory, or on its way there; None if neither."""
        with self._changed:
            if digest in self._slots.residents:
                return "resident"
            return "loading" if any(t.version.digest == digest for t in self._slots.waiting) else None

    def hold(self, version: Version) -> Ticket:
        """Ask for a version; every ticket is later given to ``let_go``, unless its future fails or is cancelled."""
        with self._changed:
            ticket = self._slots.hold(version)
            self._changed.notify_all()
            return ticket

    def prefetch(self, version: Version) -> None:
        """Have a version in memory as soon as there is a place that nobody uses; no request waits for that."""
        with self._changed:
            if not any(ticket.version.digest == version.digest for ticket in self._slots.waiting):
                self._slots.hold(version, hint=True)
                self._changed.notify_all()

    def pin(self, version: Version) -> Ticket:
        """Keep the current version of this variant in memory, from now on. The ticket is to be let go once it is there.

        Raises RequestRefused where nobody else would have a slot.
        """
        with self._changed:
            self._slots.pin(version.variant)
        return self.hold(version)

    async def keep(self, version: Version) -> None:
        """``pin``, and wait until it is there; unpinned if that fails. Raises ArtifactError, RequestRefused."""
        ticket = self.pin(version)
        try:
            await asyncio.wrap_future(ticket.future)
        except BaseException:
            self.unpin(version.variant)
            raise
        finally:
            self.let_go(ticket)

    def unpin(self, name: str) -> None:
        """Let a variant be evicted like all others; nothing is done about one that is not pinned."""
        with self._changed:
            self._slots.unpin(name)
            self._changed.notify_all()

    def let_go(self, ticket: Ticket) -> None:
        """The request is over, or gave up waiting."""
        with self._changed:
            self._slots.let_go(ticket)
            self._changed.notify_all()

    def forget(self, digest: str) -> None:
        """Free the version's memory, now or when its last request is over."""
        with self._changed:
            self._slots.forget(digest)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop the loading thread; nothing is loaded any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _report_evicted(self, variant: str) -> None:
        self.reports.evicted(variant)

    def _run(self) -> None:
        while (loading := self._next()) is not None:
            start = perf_counter()
            try:
                fitted = self._load(loading.version)
                self.reports.loaded(loading.version.variant, perf_counter() - start)
                self._place(loading, fitted)
            except Exception as error:  # a broken artifact must not end the thread that loads all the others
                self._fail(loading, error)

    def _next(self) -> Loading | None:
        with self._changed:
            self._changed.wait_for(lambda: self._slots.loading is not None or self._closed)
            return None if self._closed else self._slots.loading

    def _place(self, loading: Loading, fitted: Fitted) -> None:
        """Wait until the bytes are there, or nobody wants them any more."""
        with self._changed:
            while not self._closed and not self._slots.place(loading, fitted):
                if not self._slots.is_wanted(loading):
                    for hint in self._slots.drop(loading):
                        hint.future.cancel()
                    return
                self._slots.advance()  # it now waits for others to leave
                self._changed.wait()

    def _fail(self, loading: Loading, error: Exception) -> None:
        version = loading.version
        self.reports.load_failed(version.variant)
        if not isinstance(error, DeltaServeError):
            told = ArtifactError(
                f"Variant {version.variant!r} (artifact {version.digest[:12]}) cannot be loaded: {error}"
            )
            told.__cause__ = error
            error = told
        with self._changed:
            for ticket in self._slots.drop(loading):
                if ticket.future.set_running_or_notify_cancel():
                    ticket.future.set_exception(error)
            self._changed.notify_all()
