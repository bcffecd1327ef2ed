"""The operations in plain torch: the definition that every other backend is compared with.

Everything is computed and accumulated in float32; ``y`` is rounded to its own dtype once, after the delta was added.
``bank`` is one layer's slots: ``bank[slot]`` is what ``prepare`` made of a variant's delta, or None where the variant
leaves the layer as it is.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from deltaserve.kernels.codes import decode
from deltaserve.kernels.decoder import Block, Heads, Norm, Step
from deltaserve.kernels.layers import Layers
from deltaserve.kernels.paged import attend
from deltaserve.kernels.parts import Delta, Dense, LowRank, Part, Rows, Sparse
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.weights import Weight

NAME = "reference"
device = torch.device("cpu")
slots = list
"""One layer's bank, with an entry a slot."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A delta with its numbers decoded to float32; ``nbytes`` is what it keeps in memory."""

    shape: tuple[int, ...]
    parts: tuple["Gathered | Factors | Full | Lines", ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """``columns`` int64 ``[blocks, K]``, ``values`` float32 ``[blocks, K, V]``, scales and factors multiplied in."""

    columns: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.columns.nbytes + self.values.nbytes

    def linear(self, x: Tensor, out: int) -> Tensor:
        """``y[t, b*V + v] = sum_k x[t, columns[b, k]] * values[b, k, v]``"""
        blocks, kept = self.columns.shape
        gathered = x[:, self.columns.flatten()].view(len(x), blocks, kept).transpose(0, 1)
        return torch.bmm(gathered, self.values).transpose(0, 1).reshape(len(x), -1)[:, :out]

    def embedding(self, ids: Tensor, width: int) -> Tensor:
        """``y[t, columns[b, k]] = values[b, k, v]`` for row ``ids[t] = b*V + v``"""
        block = self.values.shape[2]
        y = torch.zeros(len(ids), width)
        return y.scatter_(1, self.columns[ids // block], self.values[ids // block, :, ids % block])


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """``a`` float32 ``[r, in]``, ``b`` float32 ``[out, r]``."""

    a: Tensor
    b: Tensor

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def linear(self, x: Tensor, out: int) -> Tensor:
        """``y = (x @ a.T) @ b.T``"""
        return x @ self.a.T @ self.b.T

    def embedding(self, ids: Tensor, width: int) -> Tensor:
        """``y[t] = b[ids[t]] @ a``"""
        return self.b[ids] @ self.a


@dataclass(frozen=True, slots=True, eq=False)
class Full:
    """``values`` float32 ``[out, in]`` or ``[n]``."""

    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def linear(self, x: Tensor, out: int) -> Tensor:
        """``y = x @ values.T``"""
        return x @ self.values.T

    def embedding(self, ids: Tensor, width: int) -> Tensor:
        """``y[t] = values[ids[t]]``"""
        return self.values[ids]


@dataclass(frozen=True, slots=True, eq=False)
class Lines:
    """Rows ``ids`` int64 ``[n]`` hold ``values`` float32 ``[n, in]``, all others below ``mean_rows`` hold ``mean``."""

    ids: Tensor
    values: Tensor
    mean: Tensor | None
    mean_rows: int

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.values.nbytes + (0 if self.mean is None else self.mean.nbytes)

    def linear(self, x: Tensor, out: int) -> Tensor:
        """``y[t, ids] = x @ values.T``, ``y[t, other] = x @ mean``"""
        y = x.new_zeros(len(x), out)
        if self.mean is not None:
            y[:, : self.mean_rows] = (x @ self.mean)[:, None]
        y[:, self.ids] = x @ self.values.T
        return y

    def embedding(self, ids: Tensor, width: int) -> Tensor:
        """``y[t] = values[i]`` where ``ids[t] == self.ids[i]``, else the mean row"""
        y = torch.zeros(len(ids), width)
        if self.mean is not None:
            y[ids < self.mean_rows] = self.mean
        if len(self.ids):
            at = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
            found = self.ids[at] == ids
            y[found] = self.values[at[found]]
        return y


def prepare(delta: Delta) -> Prepared:
    """Decode a delta into this backend's layout."""
    return Prepared(delta.shape, tuple(_prepare_part(part) for part in delta.parts))


def one_variant() -> AbstractContextManager[Callable[[Delta], Prepared]]:
    """``prepare`` for one variant's deltas; a backend may lay them out together, for use after the context only."""
    return nullcontext(prepare)


def _prepare_part(part: Part) -> Gathered | Factors | Full | Lines:
    match part:
        case Sparse():
            columns = part.columns.long()
            return Gathered(columns, decode(part.values) * part.factors[columns][:, :, None])
        case LowRank():
            return Factors(decode(part.a), decode(part.b))
        case Dense():
            return Full(decode(part.values))
        case Rows():
            return Lines(part.ids, decode(part.values), part.mean, part.mean_rows)


def tiles(rows: int, slots: int, runs: int | None = None) -> None:
    """Nothing is captured here: the host reads ``Segments``."""


def layers(weights: Sequence[Weight], slots: int, *, copies: bool = False) -> Layers:
    """Layers that read the same input, with empty banks. ``copies``: weights may be kept twice; here they are not."""
    return Layers(tuple(weights), tuple([None] * slots for _ in weights))


def linear(x: Tensor, layers: Layers, segments: Segments | None) -> list[Tensor]:
    """Each layer's ``y = x @ weight.T + bias``, then ``y[rows] += x[rows] @ delta[slot].T + bias delta``, by slot.

    ``x`` ``[rows, in]``; ``segments`` None: all rows are the base's. Returns ``[rows, out]`` for each layer.
    """
    ys = [layers.product(layer, x) for layer in range(len(layers.weights))]
    for layer, y in enumerate(ys):
        layers.add(layer, y, x, segments, delta_linear_)
    return ys


def linear_(y: Tensor, x: Tensor, layers: Layers, segments: Segments | None) -> None:
    """``linear`` of one layer into ``y``, whose columns beyond the base's keep what they hold, deltas added."""
    y[:, : len(layers.weights[0].values)] = layers.product(0, x)
    layers.add(0, y, x, segments, delta_linear_)


def delta_linear_(y: Tensor, x: Tensor, bank: Sequence[Prepared | None], segments: Segments) -> None:
    """``y[rows of slot, :out] += x[rows of slot] @ delta[slot].T`` for every slot of the batch, in place.

    ``y`` ``[rows, width]`` with ``width >= out`` of every delta, ``x`` ``[rows, in]``. Rows of the base are untouched.
    """
    for slot, rows in segments.rows.items():
        if (delta := bank[slot]) is not None:
            out = delta.shape[0]
            inputs = x[rows].float()
            total = sum((part.linear(inputs, out) for part in delta.parts), y[rows, :out].float())
            y[rows, :out] = total.to(y.dtype)


def delta_embedding_(y: Tensor, ids: Tensor, bank: Sequence[Prepared | None], segments: Segments) -> None:
    """``y[t] += delta[slot of t][ids[t]]`` for every row of the batch that is a variant's, in place.

    ``y`` ``[rows, width]``, ``ids`` int64 ``[rows]`` below ``delta.shape[0]``. Rows of the base are not touched.
    """
    for slot, rows in segments.rows.items():
        if (delta := bank[slot]) is not None:
            total = sum((part.embedding(ids[rows], y.shape[1]) for part in delta.parts), y[rows].float())
            y[rows] = total.to(y.dtype)


def rms_norm(x: Tensor, table: Tensor, places: Tensor | None, epsilon: float, offset: float) -> Tensor:
    """``y[t] = (table[places[t]] + offset) * x[t] / sqrt(mean(x[t]**2) + epsilon)``, in float32, in the dtype of ``x``.

    ``x`` ``[rows, .., n]``, ``table`` ``[entries, n]``: one vector for the base and each slot; ``places`` int64
    ``[rows]``, None where every row takes the first entry.
    """
    weight = table[0] if places is None else table[places].view(len(x), *[1] * (x.dim() - 2), -1)
    normal = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
    return ((weight.float() + offset) * normal).to(x.dtype)


def unpack(delta: Delta) -> Tensor:
    """The delta as a dense float32 tensor of its shape: the oracle of every test. Takes about twice its bytes."""
    prepared = prepare(delta)
    if len(delta.shape) == 1:
        return torch.stack([part.values for part in prepared.parts if isinstance(part, Full)]).sum(0)
    ids, total = torch.arange(delta.shape[0]), torch.zeros(delta.shape)
    for part in prepared.parts:
        total += part.embedding(ids, delta.shape[1])
    return total


@dataclass(frozen=True, slots=True, eq=False)
class SwapToken:
    """What ``swap_in_`` overwrote: flat positions int64 ``[n]`` and the values that stood there."""

    positions: Tensor
    values: Tensor


def swap_in_(weight: Tensor, delta: Delta) -> SwapToken:
    """``weight += delta`` in place, rounded once; returns what ``swap_out_`` needs. ``weight`` must be contiguous."""
    dense = unpack(delta).flatten()
    positions = dense.nonzero().flatten()
    flat = weight.view(-1)
    token = SwapToken(positions, flat[positions].clone())
    flat[positions] = (flat[positions].float() + dense[positions]).to(weight.dtype)
    return token


def swap_out_(weight: Tensor, token: SwapToken) -> None:
    """Put back what ``swap_in_`` overwrote: the weight is bit-identical to what it was."""
    weight.view(-1)[token.positions] = token.values


def swap_in_all_(weights: Sequence[Tensor], deltas: Sequence[Delta]) -> list[SwapToken]:
    """``swap_in_`` of a whole variant."""
    return [swap_in_(weight, delta) for weight, delta in zip(weights, deltas, strict=True)]


def swap_out_all_(weights: Sequence[Tensor], tokens: Sequence[SwapToken]) -> None:
    """Put back what ``swap_in_all_`` overwrote in the same weights."""
    for weight, token in zip(weights, tokens, strict=True):
        swap_out_(weight, token)


class Decoder:
    """Blocks of a model, one after the other; a backend's ``decoder`` computes the same."""

    def __init__(self, blocks: Sequence[Block], heads: Heads) -> None:
        self._blocks, self._heads = blocks, heads

    def run(self, x: Tensor, step: Step) -> None:
        """``x`` float32 ``[rows, n]`` through all blocks, in place."""
        for block, (keys, values) in zip(self._blocks, step.cache, strict=True):
            x += self._attention(_normed(block.attention_norm, x, step), block, keys, values, step)
            gate, up = linear(_normed(block.mlp_norm, x, step), block.gate_and_up, step.segments)
            x += linear(silu(gate) * up, block.down, step.segments)[0]

    def _attention(self, x: Tensor, block: Block, keys: Tensor, values: Tensor, step: Step) -> Tensor:
        width = self._heads.width
        query, key, value = (y.view(len(x), -1, width) for y in linear(x, block.input, step.segments))
        keys[step.writes], values[step.writes] = _turned(key, step), value
        attended = attend(_turned(query, step), keys, values, step.pages, self._heads.scale)
        return linear(attended.flatten(1), block.output, step.segments)[0]


def _normed(norm: Norm, x: Tensor, step: Step) -> Tensor:
    table = norm.weight[None] if step.places is None else norm.table
    return rms_norm(x, table, step.places, norm.epsilon, norm.offset)


def _turned(x: Tensor, step: Step) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * step.cosines[:, None] + torch.cat((-high, low), -1) * step.sines[:, None]


decoder = Decoder
