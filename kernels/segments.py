"""Which rows of a flat batch belong to which variant."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

BASE = -1
"""The slot number of rows that belong to the base, and of padding."""


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Runs of consecutive rows; run ``i`` is rows ``offsets[i] .. offsets[i + 1]`` and belongs to slot ``slots[i]``.

    ``offsets`` int32 ``[n + 1]`` starting at 0, ``slots`` int32 ``[n]`` with ``BASE`` for the base. ``rows`` has, for
    each slot in the batch, its rows: a slice where they are consecutive, else an int64 index.
    """

    offsets: Tensor
    slots: Tensor
    rows: dict[int, slice | Tensor] = field(repr=False)

    @classmethod
    def of(cls, lengths: Sequence[int], slots: Sequence[int]) -> "Segments":
        """Segments of these lengths, in flat order; neighbours of one slot are joined."""
        offsets: list[int] = [0]
        owners: list[int] = []
        for length, slot in zip(lengths, slots, strict=True):
            if length <= 0:
                continue
            if owners and owners[-1] == slot:
                offsets[-1] += length
            else:
                owners.append(slot)
                offsets.append(offsets[-1] + length)
        return cls(
            torch.tensor(offsets, dtype=torch.int32), torch.tensor(owners, dtype=torch.int32), _rows(offsets, owners)
        )

    def __len__(self) -> int:
        """Rows covered."""
        return int(self.offsets[-1])

    def slot_of_row(self) -> Tensor:
        """int64 ``[rows]``: the slot of each row."""
        return self.slots.long().repeat_interleave(self.offsets.diff().long())


class Table(Protocol):
    """A segment table that stays where it is on a device, for launches that are made again: ``assign`` changes it.

    ``rows`` is that of the segments it has. ``places`` int32, for each row that there can be: 0 for the base's, else 1
    plus the slot.
    """

    @property
    def rows(self) -> dict[int, slice | Tensor]: ...
    @property
    def places(self) -> Tensor: ...
    def assign(self, segments: Segments) -> None: ...


def _rows(offsets: Sequence[int], owners: Sequence[int]) -> dict[int, slice | Tensor]:
    runs: dict[int, list[tuple[int, int]]] = {}
    for i, slot in enumerate(owners):
        if slot != BASE:
            runs.setdefault(slot, []).append((offsets[i], offsets[i + 1]))
    return {
        slot: slice(*parts[0]) if len(parts) == 1 else torch.cat([torch.arange(a, b) for a, b in parts])
        for slot, parts in runs.items()
    }
