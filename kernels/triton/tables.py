"""What changes between two replays of a captured launch, in device tensors that stay where they are."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from deltaserve.kernels.segments import BASE, Segments
from deltaserve.kernels.triton import descriptor as at
from deltaserve.kernels.triton.layout import Prepared
from deltaserve.kernels.triton.linear import FEW, FULL

LARGEST_RANK = 256


class Slots(Sequence[Prepared | None]):
    """One layer's bank. ``table`` int64 ``[slots, 1 + MAX_PARTS, FIELDS]`` is what the kernels read.

    ``rank`` is the largest that a slot's low-rank parts may have together; 0 saves a launch at every call. Assigning a
    slot copies one descriptor to the device, in the order of the current stream: a replay sees the old or the new one.
    """

    def __init__(self, prepared: Sequence[Prepared | None], device: torch.device, rank: int = LARGEST_RANK) -> None:
        self.rank = rank
        self.prepared: list[Prepared | None] = [None] * len(prepared)
        self.biases: list[Tensor | None] = [None] * len(prepared)
        self.table = torch.zeros(
            len(prepared), 1 + at.MAX_PARTS.value, at.FIELDS.value, dtype=torch.int64, device=device
        )
        for slot, one in enumerate(prepared):
            self[slot] = one

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, slot: Any) -> Any:
        return self.prepared[slot]

    def __setitem__(self, slot: int, prepared: Prepared | None) -> None:
        if prepared is not None and prepared.rank > self.rank:
            raise ValueError(f"A delta of rank {prepared.rank}; these slots were made for at most {self.rank}")
        if prepared is not None and prepared.memory.device != self.table.device:
            raise ValueError(f"A delta on {prepared.memory.device}; these slots are on {self.table.device}")
        self._write(slot, prepared, self.biases[slot])

    def set_bias(self, slot: int, bias: Tensor | None) -> None:
        """A bias delta ``[n]`` beside the slot's weight delta, which has at least ``n`` rows if there is one."""
        if bias is not None:
            bias = bias.to(self.table.device, torch.float32).contiguous()
        self._write(slot, self.prepared[slot], bias)

    def _write(self, slot: int, prepared: Prepared | None, bias: Tensor | None) -> None:
        descriptor = torch.zeros_like(self.table[slot]) if prepared is None else prepared.descriptor
        if bias is not None:
            rows = len(bias) if prepared is None else prepared.shape[0]
            if len(bias) > rows:
                raise ValueError(f"A bias delta of {len(bias)} rows beside a weight delta of {rows}")
            descriptor = descriptor.clone()
            descriptor[0, at.ROWS.value] = rows
            descriptor[0, at.BIAS.value] = bias.data_ptr()
            descriptor[0, at.BIAS_ROWS.value] = len(bias)
        self.table[slot].copy_(descriptor)
        self.prepared[slot], self.biases[slot] = prepared, bias


class Tiles:
    """A segment table, cut into tiles of rows, for at most ``capacity`` rows in at most ``runs`` runs of one owner.

    ``table`` int32 ``[most tiles, 3]``: first row, number of rows, slot; unused places belong to nobody. ``places``
    int32 ``[capacity]``: where a table of the base's and then each slot's entry has that of each row. ``rows`` is that
    of the segments that were assigned last, on the host. ``assign`` writes another segment table in place, by one copy
    in the order of the current stream, for the next replay.
    """

    def __init__(self, capacity: int, slots: int, device: torch.device, runs: int | None = None) -> None:
        self.slots = slots
        self.rows: dict[int, slice | Tensor] = {}
        self._capacity, self._runs = capacity, capacity if runs is None else runs
        most = self.most(capacity)
        self._memory = _tables(most, capacity).to(device)
        self.table, self.places = self._memory[: 3 * most].view(most, 3), self._memory[3 * most :]

    def most(self, rows: int) -> int:
        """Tiles that so many rows are cut into, at most."""
        return min(rows, rows // FULL.value + FULL.value // FEW.value * self._runs)

    def assign(self, segments: Segments) -> None:
        """Raises ValueError for a malformed table, an unknown slot, or more rows or runs than there are places."""
        rows = int(segments.offsets[-1])
        tiles = cut(segments, min(self._capacity, rows), self.slots)
        if len(tiles) > self.most(rows):
            raise ValueError(f"A segment table of {len(segments.slots)} runs; this one was made for {self._runs}")
        most = len(self.table)
        memory = _tables(most, self._capacity)
        memory[: 3 * len(tiles)] = tiles.flatten()
        memory[3 * most : 3 * most + rows] = segments.slot_of_row() - BASE
        self._memory.copy_(memory)
        self.rows = segments.rows


def _tables(tiles: int, rows: int) -> Tensor:
    """Tiles that are nobody's, and places that are the base's."""
    return torch.cat([torch.full((3 * tiles,), BASE, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)])


def cut(segments: Segments, rows: int, slots: int) -> Tensor:
    """int32 ``[tiles, 3]``: each variant's segments in tiles of ``FULL`` rows, what is left in tiles of ``FEW``.

    Raises ValueError unless the segments cover ``rows`` rows and name ``slots`` slots or the base.
    """
    offsets, owners = segments.offsets.tolist(), segments.slots.tolist()
    ascends = all(a <= b for a, b in pairwise(offsets))
    if not ascends or offsets[0] != 0 or offsets[-1] != rows or len(offsets) != len(owners) + 1:
        raise ValueError(
            f"The segment table must begin at 0, ascend, and end at the number of rows of y and x, {rows}; "
            f"it has {len(owners)} segments, from {offsets[0]} to {offsets[-1]}"
        )
    for slot in owners:
        if slot != BASE and not 0 <= slot < slots:
            raise ValueError(f"The segment table names slot {slot}, that the bank of {slots} slots does not have")
    tiles: list[tuple[int, int, int]] = []
    for (first, end), slot in zip(pairwise(offsets), owners, strict=True):
        while slot != BASE and first < end:
            size = FULL.value if end - first >= FULL.value else min(FEW.value, end - first)
            tiles.append((first, size, slot))
            first += size
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 3)
