"""Which rows of the running step belong to which slot of the bank; every delta-aware layer looks here."""

from collections.abc import Callable, Sequence

import torch

from deltaserve.kernels.segments import BASE, Segments, Table


class Rows:
    """The rows that one kind of layer sees. ``segments`` is None while none of them is a variant's.

    ``places`` ``[rows]`` is where a table of the base's and then each slot's entry has that of each row; it means
    nothing while ``segments`` is None. With a ``table`` of the backend's, that is always ``segments``, and ``places``
    are its own: a captured launch reads there what belongs to whom when it is made again.
    """

    __slots__ = ("places", "segments", "table")

    def __init__(self, table: Table | None = None) -> None:
        self.table = table
        self.segments: Segments | Table | None = table
        self.places = torch.empty(0, dtype=torch.int64) if table is None else table.places

    def assign(self, lengths: Sequence[int], slots: Sequence[int]) -> None:
        """Runs of ``lengths`` consecutive rows belong to ``slots``."""
        if self.table is not None:
            self.table.assign(Segments.of(lengths, slots))
            self.places = self.table.places[: sum(lengths)]
            return
        if all(slot == BASE for slot in slots):
            self.segments = None
            return
        segments = Segments.of(lengths, slots)
        self.places = segments.slot_of_row() - BASE
        self.segments = segments


class Routing:
    """``tokens``: a row for each token of the step. ``logits``: a row for each request, which is all the head sees.

    ``body``: the rows of ``tokens`` for the layers that a variant can be swapped into; while one is, they are nobody's.
    ``table`` makes the tables that a backend reads on its device, where it does.
    """

    __slots__ = ("body", "logits", "tokens")

    def __init__(self, table: Callable[[], Table | None] = lambda: None) -> None:
        self.tokens = Rows(table())
        self.body = Rows(table())
        self.logits = Rows(table())

    def assign(
        self,
        lengths: Sequence[int],
        slots: Sequence[int],
        wants_token: Sequence[bool],
        *,
        swapped: bool = False,
        padding: tuple[int, int] = (0, 0),
    ) -> None:
        """One entry a request, in flat order: how many rows it has, whose it is, whether its last row gives a token.

        The head gets one row a request; those of requests that want no token come last and are nobody's. So are rows
        of ``padding``, behind all others: of tokens, and of the head. ``swapped``: all rows are those of the variant
        that is in the base's weights.
        """
        padded = [*lengths, padding[0]], [*slots, BASE]
        self.tokens.assign(*padded)
        if self.body.table is not None:
            self.body.assign(*(([sum(padded[0])], [BASE]) if swapped else padded))
        else:
            self.body.segments = None if swapped else self.tokens.segments
            self.body.places = self.tokens.places
        wanted = [slot for slot, wants in zip(slots, wants_token, strict=True) if wants]
        idle = len(slots) - len(wanted) + padding[1]
        self.logits.assign([1] * (len(wanted) + idle), wanted + [BASE] * idle)
