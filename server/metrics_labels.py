"""Which variants have metrics of their own: so many at most, so that uploads cannot grow the metrics without end."""

import threading
from collections.abc import Callable, Iterable

OTHER = "other"


class ModelLabels:
    """Labels for the base and ``room`` variants, first come, first served; the others share ``OTHER``.

    A variant that was removed gives its place back: ``on_gone`` is told its label.
    """

    def __init__(self, base: str, room: int, on_gone: Callable[[str], None]) -> None:
        self.base, self._room, self._on_gone = base, room, on_gone
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def of(self, variant: str) -> str:
        """The label of a variant, or of the base (empty, or its name)."""
        if variant in ("", self.base):
            return self.base
        with self._lock:
            if variant not in self._known and len(self._known) < self._room:
                self._known.add(variant)
            return variant if variant in self._known else OTHER

    def keep(self, variants: Iterable[str]) -> None:
        """Only these exist; if there is room for all, each gets a label of its own."""
        existing = set(variants)
        with self._lock:
            gone = self._known - existing
            self._known -= gone
            if len(existing) <= self._room:
                self._known = existing
        for label in gone:
            self._on_gone(label)
