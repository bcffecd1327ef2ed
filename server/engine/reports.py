"""What an engine tells whoever watches it: events as they come, and its state when asked."""

from dataclasses import dataclass


class Reports:
    """Events, by variant (empty for the base). Does nothing here; called from the engine's threads, so be quick."""

    def began(self, variant: str, prompt_tokens: int, cached_tokens: int) -> None:
        """A request entered a batch for the first time; so many of its prompt's tokens were in the cache."""

    def stepped(self, tokens: int) -> None:
        """A step of so many tokens is over."""

    def generated(self, variant: str, tokens: int) -> None:
        """So many tokens were chosen in one step."""

    def displaced(self, requests: int) -> None:
        """So many requests left the batch for lack of cache, to come back later."""

    def waited(self, variant: str, seconds: float) -> None:
        """A request waited so long for its variant's weights."""

    def loaded(self, variant: str, seconds: float) -> None:
        """A variant was read and decoded."""

    def load_failed(self, variant: str) -> None:
        """A variant could not be."""

    def evicted(self, variant: str) -> None:
        """A variant left the memory."""


@dataclass(frozen=True, slots=True)
class ResidentVariant:
    """A version in memory, its bytes there, and how many requests hold it."""

    variant: str
    digest: str
    nbytes: int
    requests: int


@dataclass(frozen=True, slots=True)
class EngineState:
    """What an engine has at one moment.

    ``running`` requests have been in a batch, ``waiting`` ones not yet; ``cold`` of these wait for their variant's
    weights. ``cache_used`` is the share of the key-value cache that requests hold. ``swapped`` is the variant in the
    base's weights, if any; ``swaps`` and ``swap_s`` count since the start, ``swap_failure`` says why none is done.
    """

    running: int = 0
    waiting: int = 0
    cold: int = 0
    cache_used: float = 0.0
    residents: tuple[ResidentVariant, ...] = ()
    bank_bytes: int = 0
    bank_slots: int = 0
    swapped: str = ""
    swaps: int = 0
    swap_s: float = 0.0
    swap_failure: str | None = None
