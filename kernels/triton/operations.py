"""The operations in Triton, one or two launches a layer; without a GPU they run in Triton's interpreter."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, knobs

from deltaserve.kernels import reference
from deltaserve.kernels.layers import Layers
from deltaserve.kernels.parts import Delta
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.triton import layout
from deltaserve.kernels.triton.layout import Prepared
from deltaserve.kernels.triton.linear import OUTS, delta_linear, project
from deltaserve.kernels.triton.rows import COLUMNS_EACH, KEPT_EACH, ROWS_EACH, delta_embedding, swap_columns
from deltaserve.kernels.triton.tables import LARGEST_RANK, Slots, Tiles, cut
from deltaserve.kernels.weights import Weight


@dataclass(frozen=True, slots=True, eq=False)
class SwapToken:
    """What ``swap_in_`` overwrote. ``rows`` int64 where only these were; ``delta`` where only its columns were."""

    saved: Tensor
    rows: Tensor | None
    delta: Prepared | None


class FusedLayers:
    """Layers that read the same input. Bias deltas are added by the kernel that adds the weights' deltas."""

    def __init__(self, weights: Sequence[Weight], banks: Sequence[Slots]) -> None:
        self.weights, self.banks = weights, banks
        self.product = Layers(weights, ()).product

    def install(self, layer: int, slot: int, prepared: Prepared | None) -> None:
        self.banks[layer][slot] = prepared

    def install_bias(self, layer: int, slot: int, bias: Tensor | None) -> None:
        self.banks[layer].set_bias(slot, bias)

    def bias_delta(self, layer: int, slot: int) -> Tensor | None:
        return self.banks[layer].biases[slot]


class TritonBackend:
    """The operations of ``reference.py`` for tensors on ``device``.

    Segment tables are checked on the host, as are ids that lie there; ids on a GPU that are out of range add nothing.
    For a captured CUDA graph, make ``slots`` and ``tiles`` once, give these to the operations instead of a list and
    ``Segments``, and change them in place between replays.

    Raises RuntimeError when created where there is neither a GPU nor Triton's interpreter.
    """

    NAME = "triton"

    def __init__(self) -> None:
        self.interpreted = knobs.runtime.interpret
        if not self.interpreted and not torch.cuda.is_available():
            raise RuntimeError(
                "The triton kernels need a GPU, and torch sees none; set TRITON_INTERPRET=1 to run them, very slowly, "
                "in Triton's interpreter"
            )
        self.device = torch.device("cpu" if self.interpreted else f"cuda:{torch.cuda.current_device()}")
        self._nothing = torch.empty(1, 1, device=self.device)
        self._tiles_of = lru_cache(maxsize=8)(self._upload)  # the layers of a step share their segments

    def prepare(self, delta: Delta) -> Prepared:
        """Lay out a delta whose tensors are on the CPU, on the device."""
        return layout.prepare(delta, self.device)

    def one_variant(self) -> AbstractContextManager[Callable[[Delta], Prepared]]:
        """``prepare`` for one variant's deltas. Raises ValueError for a rank that no slot of ``layers`` takes."""
        return nullcontext(self._prepare_for_layers)

    def _prepare_for_layers(self, delta: Delta) -> Prepared:
        prepared = self.prepare(delta)
        if prepared.rank > LARGEST_RANK:
            raise ValueError(f"A delta of rank {prepared.rank}; the GPU kernels run at most {LARGEST_RANK}")
        return prepared

    def slots(self, prepared: Sequence[Prepared | None], rank: int | None = None) -> Slots:
        """One layer's bank, which any layer's calls read and ``slots[i] = prepared`` changes in place."""
        return Slots(prepared, self.device, LARGEST_RANK if rank is None else rank)

    def tiles(self, rows: int, slots: int, runs: int | None = None) -> Tiles:
        """A segment table for at most ``rows`` rows in ``runs`` runs and banks of ``slots`` slots, at first nobody's.

        Give it to the operations in place of ``Segments``: rows beyond those that were assigned are the base's.
        """
        return Tiles(rows, slots, self.device, runs)

    def layers(self, weights: Sequence[Weight], slots: int, *, copies: bool = False) -> FusedLayers:
        """Layers that read the same input, with empty banks."""
        return FusedLayers(tuple(weights), tuple(self.slots([None] * slots) for _ in weights))

    def linear(self, x: Tensor, layers: FusedLayers, segments: Segments | Tiles | None) -> list[Tensor]:
        """``x @ weight.T + bias`` ``[rows, out]`` of each layer, with the deltas and biases of the batch's variants.

        ``segments`` None: every row is the base's.
        """
        ys = [layers.product(layer, x) for layer in range(len(layers.weights))]
        if segments is not None:
            for y, bank in zip(ys, layers.banks, strict=True):
                self.delta_linear_(y, x, bank, segments)
        return ys

    def linear_(self, y: Tensor, x: Tensor, layers: FusedLayers, segments: Segments | Tiles | None) -> None:
        """``linear`` of one layer into ``y``; columns beyond the base's are added to, as ``delta_linear_`` does."""
        y[:, : len(layers.weights[0].values)] = layers.product(0, x)
        if segments is not None:
            self.delta_linear_(y, x, layers.banks[0], segments)

    def delta_linear_(self, y: Tensor, x: Tensor, bank: Sequence[Prepared | None], segments: Segments | Tiles) -> None:
        """``y[rows of slot, :out] += x[rows of slot] @ delta[slot].T`` for every slot of the batch, in place."""
        self._check_batch(y, x, "x")
        tiles = self._tiles(segments, len(y), len(bank))
        if not len(tiles):
            return
        for delta in _deltas(bank, segments):
            if x.shape[1] != delta.shape[1]:
                raise ValueError(f"x is not as wide as a delta of this batch: {x.shape[1]}, not {delta.shape[1]}")
            if y.shape[1] < delta.shape[0]:
                raise ValueError(f"y has not the width of a delta of this batch: {y.shape[1]}, not {delta.shape[0]}")
        slots = self._slots(bank)
        inputs, which, hidden = (x, *x.stride()), (len(y), tiles, slots.table, len(slots)), self._nothing
        precision = self._precision(x.dtype)
        if slots.rank:
            hidden = torch.empty(len(y), slots.rank, device=self.device)
            grid = (len(tiles), cdiv(slots.rank, OUTS.value))
            project[grid](hidden, slots.rank, *inputs, *which, *precision)
        rows, *tables = which
        grid = (len(tiles), cdiv(y.shape[1], OUTS.value))
        delta_linear[grid](y, *y.stride(), *inputs, hidden, hidden.stride(0), rows, y.shape[1], *tables, *precision)

    def delta_embedding_(
        self, y: Tensor, ids: Tensor, bank: Sequence[Prepared | None], segments: Segments | Tiles
    ) -> None:
        """``y[t] += delta[slot of t][ids[t]]`` for every row of the batch that is a variant's, in place."""
        self._check_batch(y, ids, "ids")
        tiles = self._tiles(segments, len(y), len(bank))
        for delta in _deltas(bank, segments):
            if y.shape[1] != delta.shape[-1]:
                raise ValueError(f"y has not the width of a delta of this batch: {y.shape[1]}, not {delta.shape[-1]}")
        if ids.device.type == "cpu" and isinstance(segments, Segments):
            _check_ids(ids, bank, segments)
        self._add_rows(y, ids.long().contiguous(), self._slots(bank), tiles)

    def _add_rows(self, y: Tensor, ids: Tensor, slots: Slots, tiles: Tensor) -> None:
        if len(tiles):
            grid = (len(tiles), cdiv(y.shape[1], COLUMNS_EACH.value))
            delta_embedding[grid](y, *y.stride(), ids, *y.shape, tiles, slots.table, len(slots))

    def swap_in_(self, weight: Tensor, delta: Delta | Prepared) -> SwapToken:
        """``weight += delta`` in place, rounded once; returns what ``swap_out_`` needs. ``weight`` must be contiguous.

        All that can fail, checks and memory for what will be overwritten, comes before the first write.
        """
        prepared = delta if isinstance(delta, Prepared) else self.prepare(delta)
        if weight.shape != prepared.shape or not weight.is_contiguous() or weight.device != self.device:
            raise ValueError(
                f"swap_in_ needs a contiguous weight of the delta's shape {prepared.shape} on {self.device}, "
                f"not {tuple(weight.shape)} on {weight.device}"
            )
        if prepared.sparse_alone is not None:
            saved = weight.new_empty(prepared.sparse_alone)
            self._swap_columns(weight, saved, prepared, swap_in=True)
            return SwapToken(saved, None, prepared)
        matrix, rows = weight.view(-1, weight.shape[-1]), prepared.rows_alone
        ids = torch.arange(len(matrix), device=self.device) if rows is None else rows
        tiles = cut(Segments.of([len(ids)], [0]), len(ids), 1).to(self.device)
        slots = self.slots([prepared], prepared.rank)
        saved = matrix.clone() if rows is None else matrix[rows]
        if rows is None:
            self._add_rows(matrix, ids, slots, tiles)
        else:
            changed = saved.clone()
            self._add_rows(changed, ids, slots, tiles)
            matrix[rows] = changed
        return SwapToken(saved, rows, None)

    def swap_out_(self, weight: Tensor, token: SwapToken) -> None:
        """Put back what ``swap_in_`` overwrote: the weight is bit-identical to what it was."""
        if token.delta is not None:
            self._swap_columns(weight, token.saved, token.delta, swap_in=False)
        elif token.rows is not None:
            weight.view(-1, weight.shape[-1])[token.rows] = token.saved
        else:
            weight.view_as(token.saved).copy_(token.saved)

    rms_norm = staticmethod(reference.rms_norm)

    def swap_in_all_(self, weights: Sequence[Tensor], deltas: Sequence[Delta | Prepared]) -> list[SwapToken]:
        """``swap_in_`` of a whole variant."""
        return [self.swap_in_(weight, delta) for weight, delta in zip(weights, deltas, strict=True)]

    def swap_out_all_(self, weights: Sequence[Tensor], tokens: Sequence[SwapToken]) -> None:
        """Put back what ``swap_in_all_`` overwrote in the same weights."""
        for weight, token in zip(weights, tokens, strict=True):
            self.swap_out_(weight, token)

    def _swap_columns(self, weight: Tensor, saved: Tensor, delta: Prepared, *, swap_in: bool) -> None:
        grid = (cdiv(len(weight), ROWS_EACH.value), cdiv(saved.shape[1], KEPT_EACH.value))
        swap_columns[grid](weight, saved, delta.descriptor, IN=swap_in)

    def _check_batch(self, y: Tensor, inputs: Tensor, name: str) -> None:
        if y.device != self.device or inputs.device != self.device:
            raise ValueError(f"The triton kernels run on {self.device}; y is on {y.device}, {name} on {inputs.device}")
        if len(inputs) != len(y):
            raise ValueError(f"{len(inputs)} {name} for {len(y)} rows of y")

    def _tiles(self, segments: Segments | Tiles, rows: int, slots: int) -> Tensor:
        if isinstance(segments, Tiles):
            return segments.table[: segments.most(rows)]
        return self._tiles_of(segments, rows, slots)

    def _upload(self, segments: Segments, rows: int, slots: int) -> Tensor:
        return cut(segments, rows, slots).to(self.device)

    def _slots(self, bank: Sequence[Prepared | None]) -> Slots:
        """A plain list serves as well, at the price of an upload at every call."""
        if isinstance(bank, Slots):
            return bank
        return self.slots(bank, max((delta.rank for delta in bank if delta is not None), default=0))

    def _precision(self, dtype: torch.dtype) -> tuple[Any, str]:
        """What tensor cores multiply, and how they take float32.

        float16 has too few exponents for small deltas, but fits into TF32. The interpreter cannot multiply bfloat16.
        """
        if dtype is torch.float32 or self.interpreted:
            return tl.float32, "ieee"
        return (tl.bfloat16 if dtype is torch.bfloat16 else tl.float32), ("ieee" if torch.version.hip else "tf32")


def _deltas(bank: Sequence[Prepared | None], segments: Segments | Tiles) -> list[Prepared]:
    """Those of the batch, where the host knows them."""
    slots = segments.rows if isinstance(segments, Segments) else ()
    return [delta for slot in slots if (delta := bank[slot]) is not None]


def _check_ids(ids: Tensor, bank: Sequence[Prepared | None], segments: Segments) -> None:
    for slot, rows in segments.rows.items():
        if (delta := bank[slot]) is None:
            continue
        count = delta.shape[0] if len(delta.shape) == 2 else 1
        if not bool(((ids[rows] >= 0) & (ids[rows] < count)).all()):
            raise ValueError(f"An id is outside of its variant's vocabulary of {count} in slot {slot}")
