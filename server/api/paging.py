"""Lists in pages, as OpenAI has them: so many objects, behind the one that ended the page before."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from deltaserve.delta_store.errors import DeltaServeError


class Identified(Protocol):
    """Something with an id."""

    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=Identified)


def page(found: Sequence[T], after: str | None, limit: int, missing: type[DeltaServeError]) -> tuple[Sequence[T], bool]:
    """At most ``limit`` of those behind the one with the id ``after``, and whether there are more.

    Raises ``missing`` where ``after`` is not among them.
    """
    begin = 0
    if after is not None:
        ids = [one.id for one in found]
        if after not in ids:
            raise missing(f"{after[:64]!r} is not in this list, so nothing is behind it")
        begin = ids.index(after) + 1
    return found[begin : begin + limit], len(found) > begin + limit
