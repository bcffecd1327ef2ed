"""Find stop strings in text that arrives in pieces, without ever letting out the beginning of one."""

from collections.abc import Sequence


class StopStrings:
    """Cuts a text at the stop string that begins first in it, however the text is divided into pieces.

    What may still become a stop string is held back until it cannot, or until the text ends.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Take the next piece; returns what is certain to belong to the answer. Sets ``matched`` at a stop string."""
        self._held += text
        for start in range(len(self._held)):
            rest = self._held[start:]
            if rest.startswith(self._stops):
                self.matched = True
                return self._release(start)
            if any(stop.startswith(rest) for stop in self._stops):
                return self._release(start)
        return self._release(len(self._held))

    def finish(self) -> str:
        """The text has ended: returns the rest of the answer. Sets ``matched`` if a stop string was waiting in it."""
        found = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        self.matched = bool(found)
        return self._release(min(found, default=len(self._held)))

    def _release(self, end: int) -> str:
        released, self._held = self._held[:end], self._held[end:]
        return released
