"""The operations in C++: one call a layer for the whole batch, whatever the number of its variants."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import Array, byref
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from deltaserve.kernels import paged, reference
from deltaserve.kernels.cpu.decoder import CACHE_CODECS, CpuDecoder, attention_struct, pages_struct
from deltaserve.kernels.cpu.layers import WEIGHT_CODECS, Layers, Slots
from deltaserve.kernels.cpu.layout import Prepared, prepare
from deltaserve.kernels.cpu.library import library, operations
from deltaserve.kernels.cpu.memory import Memory
from deltaserve.kernels.cpu.products import Choice, Product, choose, packed, plain, product_for, with_copy
from deltaserve.kernels.cpu.structs import MatrixStruct, SwapStruct
from deltaserve.kernels.decoder import Block, Heads
from deltaserve.kernels.paged import Pages
from deltaserve.kernels.parts import Delta
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.weights import Weight

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ERRORS = {
    1: "The segment table must begin at 0, ascend, and end at the number of rows of y and x",
    2: "The segment table names a slot that the bank does not have",
    3: "x is not as wide as a delta of this batch",
    4: "y has not the width of a delta of this batch",
    5: "An id is outside of its variant's vocabulary",
    7: "The delta has not the weight's shape, or layers do not fit together",
    8: "A row's keys, or the place for its own, are outside of the cache",
}


@dataclass(frozen=True, slots=True, eq=False)
class SwapToken:
    """What swapping in overwrote: the columns of sparse parts, and whole rows of the other weights, by their index."""

    swaps: Array[SwapStruct]
    rows: tuple[tuple[int, Tensor, Tensor], ...]
    _kept: tuple[Any, ...]


class CpuBackend:
    """The operations of ``reference.py`` for one instruction set.

    Raises RuntimeError when created for one that this machine or this build does not have. Its methods raise
    ValueError for a malformed segment table, slot, id or shape, before anything is written.
    """

    def __init__(self, instruction_set: str) -> None:
        self.NAME = f"cpu-{instruction_set}"
        self._operations = operations(instruction_set)
        self._linear = library().deltaserve_linear
        self._embedding = library().deltaserve_embedding
        self._swap = library().deltaserve_swap
        self._rms_norm = library().deltaserve_rms_norm
        self._attend = library().deltaserve_attend
        self._decode = library().deltaserve_decode
        self._choices: dict[Any, Choice] = {}

    device = torch.device("cpu")
    prepare = staticmethod(prepare)
    tiles = staticmethod(reference.tiles)

    @contextmanager
    def one_variant(self) -> Iterator[Callable[[Delta], Prepared]]:
        """``prepare`` for the deltas of one variant, which lie together; for use after the context only."""
        memory = Memory()
        yield lambda delta: prepare(delta, memory)
        memory.settle()

    slots = Slots

    def layers(self, weights: Sequence[Weight], slots: int, *, copies: bool = False) -> Layers:
        """Prepare layers with one input for ``linear``; the first of its shapes times which product serves it best.

        ``copies``: weights may be kept twice where that is faster; swapping into them is then not possible.
        """
        if any(weight.values.dtype not in WEIGHT_CODECS for weight in weights):
            return Layers(weights, slots, ((1, plain),))
        key = (*((weight.values.shape, weight.values.dtype) for weight in weights), torch.get_num_threads(), copies)
        if key not in self._choices:
            self._choices[key] = choose(weights, self.product_of, copies=copies)
        choice = self._choices[key]
        if any(product is packed for _, product in choice):
            weights = [with_copy(weight) for weight in weights]
        return Layers(weights, slots, choice)

    def linear(self, x: Tensor, layers: Layers, segments: Segments | None) -> list[Tensor]:
        """``x @ weight.T + bias`` ``[rows, out]`` of each layer, with the deltas and biases of the batch's variants.

        ``segments`` None: every row is the base's.
        """
        rows = len(x)
        together = torch.empty(rows * sum(layers.out), dtype=x.dtype)
        parts = torch.split_with_sizes(together, [rows * out for out in layers.out])
        ys = [part.view(rows, out) for part, out in zip(parts, layers.out, strict=True)]
        self._linear_(ys, x, layers, segments)
        return ys

    def linear_(self, y: Tensor, x: Tensor, layers: Layers, segments: Segments | None) -> None:
        """``linear`` of one layer into ``y``; to its columns beyond the base's a variant's added rows are added."""
        self._linear_([y], x, layers, segments)

    def _linear_(self, ys: Sequence[Tensor], x: Tensor, layers: Layers, segments: Segments | None) -> None:
        rows, width = x.shape
        if width != layers.width:
            raise ValueError(f"x is not as wide as the layer: {width}, not {layers.width}")
        product = product_for(rows, layers.products)
        structs = layers.whole
        if product is not None and (structs is None or x.dtype == layers.weights[0].values.dtype):
            structs = layers.deltas
            for y, weight, out in zip(ys, layers.weights, layers.out, strict=True):
                product(x, weight, y[:, :out])
            if segments is None or not segments.rows:
                return
        held = [table.held.copy() for table in layers.tables]
        self._run(structs, len(layers.out), ys[0], x, None if segments is None or not segments.rows else segments)
        del held  # until here: another thread may empty a slot meanwhile

    def delta_linear_(self, y: Tensor, x: Tensor, bank: Sequence[Prepared | None], segments: Segments) -> None:
        """``y[rows of slot, :out] += x[rows of slot] @ delta[slot].T`` for every slot of the batch, in place."""
        if not segments.rows:
            return
        if y.stride(1) != 1:
            return _in_a_copy(y, lambda copy: self.delta_linear_(copy, x, bank, segments))
        table = bank if type(bank) is Slots else Slots(bank)
        held = table.held.copy()
        self._run(table.layers, 1, y, x, segments)
        del held

    def _run(self, structs: Any, count: int, y: Tensor, x: Tensor, segments: Segments | None) -> None:
        if x.stride(1) != 1:
            x = x.contiguous()
        offsets, owners, runs = None, None, 0
        if segments is not None:
            offsets, owners, runs = segments.offsets.data_ptr(), segments.slots.data_ptr(), segments.slots.numel()
        # fmt: off
        error = self._linear(
            self._operations, structs, count,
            y.data_ptr(), y.stride(0), *y.shape, _DTYPES[y.dtype],
            x.data_ptr(), x.stride(0), *x.shape, _DTYPES[x.dtype],
            offsets, owners, runs,
        )
        # fmt: on
        if error:
            raise _exception(error)

    def product_of(self, weight: Weight) -> Product:
        """The kernels' own product for one weight."""
        layers = Layers([weight], 0, ((1, None),))
        return lambda x, weight, y: self._run(layers.whole, 1, y, x, None)

    def delta_embedding_(self, y: Tensor, ids: Tensor, bank: Sequence[Prepared | None], segments: Segments) -> None:
        """``y[t] += delta[slot of t][ids[t]]`` for every row of the batch that is a variant's, in place."""
        if not segments.rows:
            return
        if y.stride(1) != 1:
            return _in_a_copy(y, lambda copy: self.delta_embedding_(copy, ids, bank, segments))
        if len(ids) != len(y):
            raise ValueError(f"{len(ids)} ids for {len(y)} rows of y")
        ids = ids.long().contiguous()
        table = bank if type(bank) is Slots else Slots(bank)
        held = table.held.copy()
        offsets, owners = segments.offsets, segments.slots
        # fmt: off
        error = self._embedding(
            self._operations,
            y.data_ptr(), y.stride(0), *y.shape, _DTYPES[y.dtype], ids.data_ptr(),
            table.address, len(held), offsets.data_ptr(), owners.data_ptr(), owners.numel(),
        )
        # fmt: on
        if error:
            raise _exception(error)

    def rms_norm(self, x: Tensor, table: Tensor, places: Tensor | None, epsilon: float, offset: float) -> Tensor:
        """``y[t] = (table[places[t]] + offset) * x[t] / sqrt(mean(x[t]**2) + epsilon)``, as ``reference.rms_norm``."""
        if x.dtype != torch.float32 or table.dtype != torch.float32 or not table.is_contiguous():
            return reference.rms_norm(x, table, places, epsilon, offset)
        x = x.contiguous()
        y, (rows, *heads, width) = torch.empty_like(x), x.shape
        if width != table.shape[1] or (places is not None and (len(places) != rows or places.dtype != torch.int64)):
            raise ValueError(f"{tuple(x.shape)} does not fit a table {tuple(table.shape)} and its places")
        # fmt: off
        error = self._rms_norm(
            self._operations, y.data_ptr(), x.data_ptr(), rows, prod(heads), width,
            table.data_ptr(), len(table), None if places is None else places.data_ptr(), epsilon, offset,
        )
        # fmt: on
        if error:
            raise _exception(error)
        return y

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, pages: Pages, scale: float) -> Tensor:
        """``softmax(query . keys * scale) @ values`` of each row, as ``paged.attend``; the cache is read in place."""
        if keys.dtype not in CACHE_CODECS:
            return paged.attend(query, keys, values, pages, scale)
        heads = Heads(query.shape[1], keys.shape[1], query.shape[2], scale)
        queries = query.float().contiguous()
        out, rows = torch.empty_like(queries), len(queries)
        attention, tables = attention_struct(keys, values, heads), pages_struct(pages, rows)
        error = self._attend(
            self._operations, byref(attention), byref(tables), queries.data_ptr(), out.data_ptr(), rows
        )
        if error:
            raise _exception(error)
        return out.to(query.dtype)

    def decoder(self, blocks: Sequence[Block], heads: Heads) -> CpuDecoder | None:
        """Blocks of a model for one call; None where the kernels' own product cannot read their weights."""

        def decode(*arguments: Any) -> None:
            if error := self._decode(self._operations, *arguments):
                raise _exception(error)

        layers = [one for b in blocks for one in (b.input, b.output, b.gate_and_up, b.down)]
        return CpuDecoder(decode, blocks, heads) if all(one.whole is not None for one in layers) else None

    def swap_in_(self, weight: Tensor, delta: Delta | Prepared) -> SwapToken:
        """``weight += delta`` in place, rounded once; returns what ``swap_out_`` needs. ``weight`` is contiguous."""
        return self.swap_in_all_([weight], [delta])

    def swap_out_(self, weight: Tensor, token: SwapToken) -> None:
        """Put back what ``swap_in_`` overwrote: the weight is bit-identical to what it was."""
        self.swap_out_all_([weight], token)

    def swap_in_all_(self, weights: Sequence[Tensor], deltas: Sequence[Delta | Prepared]) -> SwapToken:
        """``swap_in_`` of a whole variant: one call for all weights whose delta is one sparse part.

        What will be overwritten is allocated, and but for those columns copied, before the first write.
        """
        prepared = [delta if isinstance(delta, Prepared) else prepare(delta) for delta in deltas]
        for weight, delta in zip(weights, prepared, strict=True):
            if weight.shape != delta.shape or not weight.is_contiguous():
                shape = tuple(weight.shape)
                raise ValueError(f"swap_in_ needs a contiguous weight of the delta's shape {delta.shape}, not {shape}")
        short = [i for i, delta in enumerate(prepared) if delta.saved_shape is not None]
        saved = torch.empty(sum(prod(prepared[i].saved_shape or ()) for i in short) * 4, dtype=torch.uint8)
        swaps, at = (SwapStruct * len(short))(), saved.data_ptr()
        for swap, i in zip(swaps, short, strict=True):
            weight, delta = weights[i], prepared[i]
            swap.weight = MatrixStruct(weight.data_ptr(), weight.stride(0), *weight.shape, _DTYPES[weight.dtype])
            swap.delta, swap.saved = delta.address, at
            at += prod(delta.saved_shape or ()) * weight.element_size()
        others = [i for i, delta in enumerate(prepared) if delta.saved_shape is None]
        rows, changed = [], []
        for i in others:
            matrix = _matrix(weights[i])
            ids = prepared[i].rows_alone
            ids = torch.arange(len(matrix)) if ids is None else ids
            rows.append((i, ids, matrix[ids]))
            changed.append(rows[-1][2].clone())
            self.delta_embedding_(changed[-1], ids, Slots([prepared[i]]), Segments.of([len(ids)], [0]))
        self._swap_columns(swaps, swap_in=True)
        for (i, ids, _), values in zip(rows, changed, strict=True):
            _matrix(weights[i])[ids] = values
        return SwapToken(swaps, tuple(rows), (saved, prepared))

    def swap_out_all_(self, weights: Sequence[Tensor], token: SwapToken) -> None:
        """Put back what ``swap_in_all_`` overwrote in the same weights."""
        self._swap_columns(token.swaps, swap_in=False)
        for i, ids, values in token.rows:
            _matrix(weights[i])[ids] = values

    def _swap_columns(self, swaps: Array[SwapStruct], *, swap_in: bool) -> None:
        if error := self._swap(self._operations, swaps, len(swaps), swap_in):
            raise _exception(error)


def _matrix(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 2 else weight[None]


def _in_a_copy(y: Tensor, run: Callable[[Tensor], None]) -> None:
    """For a ``y`` whose rows are not contiguous."""
    copy = y.contiguous()
    run(copy)
    y.copy_(copy)


def _exception(error: int) -> Exception:
    return ValueError(_ERRORS[error]) if error in _ERRORS else MemoryError("The CPU kernels found no memory")
