"""Find the tool calls in the text of an answer as it comes."""

import re
from dataclasses import dataclass
from uuid import uuid4

from deltaserve.server.api.tools import CLOSING, OPENING

HEAD = re.compile(r'\{"name": "([a-zA-Z0-9_-]+)", "arguments": ')


@dataclass(frozen=True, slots=True)
class Said:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A call begins; ``index`` counts the answer's calls."""

    index: int
    name: str
    id: str


@dataclass(frozen=True, slots=True)
class Argued:
    """More of the arguments of call ``index``."""

    index: int
    text: str


Event = Said | Called | Argued


class CallReader:
    """Takes an answer's text piece by piece. What may be the beginning of a call is held back until it is certain.

    Blanks around calls are dropped. ``calls`` counts those that began.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._held = ""
        self._read = self._text

    def push(self, text: str) -> list[Event]:
        """What became certain with the next piece."""
        self._held += text
        events: list[Event] = []
        while (event := self._read()) is not None:
            events += event
        return events

    def finish(self) -> list[Event]:
        """The answer has ended: what is still held back."""
        rest, self._held = self._held, ""
        if self._read == self._arguments:
            return [Argued(self.calls - 1, rest)] if rest else []
        if self._read == self._name:
            rest = OPENING + rest
        return [Said(rest)] if rest.strip() or (rest and not self.calls) else []

    def _text(self) -> list[Event] | None:
        before, found = self._until(OPENING)
        text = before.rstrip()
        if found:
            self._read = self._name
        else:
            self._held = before[len(text) :] + self._held
            if not text:
                return None
        return [Said(text)] if text else []

    def _name(self) -> list[Event] | None:
        if (head := HEAD.match(self._held)) is None:
            return None
        self._held = self._held[head.end() :]
        self._read = self._arguments
        self.calls += 1
        return [Called(self.calls - 1, head[1], f"call_{uuid4().hex[:24]}")]

    def _arguments(self) -> list[Event] | None:
        before, found = self._until(CLOSING)
        if found:
            self._read = self._text
        elif not before:
            return None
        return [Argued(self.calls - 1, before)] if before else []

    def _until(self, mark: str) -> tuple[str, bool]:
        """Take from what is held all that precedes ``mark``, and the mark, or what cannot be part of it."""
        before, found, after = self._held.partition(mark)
        if not found:
            part = next((n for n in range(len(mark) - 1, 0, -1) if self._held.endswith(mark[:n])), 0)
            before, after = self._held[: len(self._held) - part], self._held[len(self._held) - part :]
        self._held = after
        return before, bool(found)
