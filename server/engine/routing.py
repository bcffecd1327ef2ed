"""Which rows of the running step belong to which slot of the bank; every delta-aware layer looks here."""

from collections.abc import Sequence

import torch

from deltaserve.kernels.segments import BASE, Segments


class Rows:
    """The rows that one kind of layer sees. ``segments`` is None while none of them is a variant's.

    ``places`` int64 ``[rows]`` is where a table of the base's and then each slot's entry has that of each row; it means
    nothing while ``segments`` is None.
    """

    __slots__ = ("places", "segments")

    def __init__(self) -> None:
        self.segments: Segments | None = None
        self.places = torch.empty(0, dtype=torch.int64)

    def assign(self, lengths: Sequence[int], slots: Sequence[int]) -> None:
        """Runs of ``lengths`` consecutive rows belong to ``slots``."""
        if all(slot == BASE for slot in slots):
            self.segments = None
            return
        segments = Segments.of(lengths, slots)
        self.places = segments.slot_of_row() - BASE
        self.segments = segments


class Routing:
    """``tokens``: a row for each token of the step. ``logits``: a row for each request, which is all the head sees.

    ``body``: the rows of ``tokens`` for the layers that a variant can be swapped into; while one is, they are nobody's.
    """

    __slots__ = ("body", "logits", "tokens")

    def __init__(self) -> None:
        self.tokens = Rows()
        self.body = Rows()
        self.logits = Rows()

    def assign(
        self, lengths: Sequence[int], slots: Sequence[int], wants_token: Sequence[bool], *, swapped: bool = False
    ) -> None:
        """One entry a request, in flat order: how many rows it has, whose it is, whether its last row gives a token.

        The head gets one row a request; those of requests that want no token come last and are nobody's. ``swapped``:
        all rows are those of the variant that is in the base's weights.
        """
        self.tokens.assign(lengths, slots)
        self.body.segments = None if swapped else self.tokens.segments
        self.body.places = self.tokens.places
        wanted = [slot for slot, wants in zip(slots, wants_token, strict=True) if wants]
        idle = len(slots) - len(wanted)
        self.logits.assign([1] * len(slots), wanted + [BASE] * idle)
