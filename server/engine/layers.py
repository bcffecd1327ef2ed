"""Delta-aware twins of a model's layers: what the base gives, and the deltas of the rows that are a variant's.

A module becomes its twin in place, by taking a subclass of its own class: it keeps its name and its parameters (shared,
not copied). A linear layer's product is the kernel backend's, an embedding's the module's own; norms.py has the norms.
"""

import inspect
import math
from collections.abc import Callable, MutableSequence, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaserve.kernels import reference
from deltaserve.kernels.dispatch import Backend
from deltaserve.kernels.parts import Delta
from deltaserve.kernels.segments import BASE, Segments, Table
from deltaserve.kernels.weights import Weight, quantised
from deltaserve.server.engine.norms import DeltaNorm
from deltaserve.server.engine.routing import Rows

Prepared = Any
"""A delta as a layer keeps it: in the backend's layout for a matrix, float32 ``[n]`` for a bias or norm."""

LayOut = Callable[[Delta], Prepared]
"""The backend's way of bringing the deltas of one variant into its layout."""


class Siblings:
    """Linear layers that read the same input one after another: the first to be asked computes for all of them."""

    def __init__(self, members: Sequence["DeltaLinear"], slots: int, backend: Backend, *, copies: bool) -> None:
        self.layers = backend.layers([member.own_weight() for member in members], slots, copies=copies)
        self.backend = backend
        self._x: Tensor | None = None
        self._ys: list[Tensor | None] = []

    def take(self, member: int, x: Tensor, segments: Segments | Table | None) -> Tensor:
        """``[rows, out]`` of one member for ``x`` ``[.., rows, in]``, which the others will ask with as well."""
        if x is not self._x or self._ys[member] is None:
            self._x, self._ys = x, list(self.backend.linear(x.reshape(-1, x.shape[-1]), self.layers, segments))
        y, self._ys[member] = self._ys[member], None
        if not any(one is not None for one in self._ys):
            self._x = None
        return y  # type: ignore[return-value]  # just computed, or found above


class DeltaLinear(nn.Module):
    """A linear layer (or GPT-2's Conv1D): ``y = base(x) + x @ delta.T + bias delta`` on the rows of variants.

    Works once ``unite`` has given it siblings. ``x`` is ``[1, rows, in]`` whenever a row is a variant's.
    ``added`` float32 ``[out]`` is what the product adds: the bias, or that of the variant that is swapped in.
    """

    rows: Rows
    siblings: Siblings
    member: int
    scales: Tensor | None
    added: Tensor | None

    def adopt(self, rows: Rows, slots: int, backend: Backend) -> None:
        self.rows, self.scales = rows, None
        bias = getattr(self, "bias", None)
        self.added = None if bias is None else bias.detach().float().clone()
        if isinstance(self, Conv1D):  # still [in, out], laid out as the kernels read it
            self.weight.data = self.weight.data.T.contiguous().T

    def quantise(self) -> None:
        """Keep the weight as int8 with a scale a row, and the float one no more; one that is shared parts from it."""
        weight = quantised(self.own_weight().values)
        values = weight.values.T if isinstance(self, Conv1D) else weight.values
        self.weight, self.scales = nn.Parameter(values, requires_grad=False), weight.scales

    def own_weight(self) -> Weight:
        weight = self.get_parameter("weight").detach()
        return Weight(weight.T if isinstance(self, Conv1D) else weight, self.scales, self.added)

    def shape_of(self, parameter: str) -> tuple[int, ...]:
        """As deltas have it: a weight is ``[out, in]``, also where the module keeps ``[in, out]``."""
        shape = tuple(self.get_parameter(parameter).shape)
        return shape[::-1] if isinstance(self, Conv1D) else shape

    def prepare(self, delta: Delta, lay_out: LayOut) -> Prepared:
        return reference.unpack(delta) if len(delta.shape) == 1 else lay_out(delta)

    def install(self, parameter: str, slot: int, prepared: Prepared | None) -> None:
        layers = self.siblings.layers
        (layers.install if parameter == "weight" else layers.install_bias)(self.member, slot, prepared)

    @torch.no_grad()
    def alter(self, parameter: str, slot: int) -> None:
        """For all rows: the bias becomes that of the slot's variant, or with ``BASE`` the base's again."""
        own = self.get_parameter(parameter).float()
        delta = None if slot == BASE else self.siblings.layers.bias_delta(self.member, slot)
        self.added.copy_(own if delta is None else own + delta)  # type: ignore[union-attr]  # else no such delta

    def forward(self, x: Tensor) -> Tensor:
        y = self.siblings.take(self.member, x, self.rows.segments)
        return y.view(*x.shape[:-1], -1)


class DeltaHead(DeltaLinear):
    """The output head. A variant's added vocabulary makes the logits wider: -inf for everybody else."""

    def adopt(self, rows: Rows, slots: int, backend: Backend) -> None:
        super().adopt(rows, slots, backend)
        self.own = self.shape_of("weight")[0]
        self.widths = [self.own] * slots
        self.added_biases: dict[int, Tensor] = {}

    def install(self, parameter: str, slot: int, prepared: Prepared | None) -> None:
        if parameter == "weight":
            self.widths[slot] = self.own if prepared is None else prepared.shape[0]
        else:
            self.added_biases.pop(slot, None)
            if prepared is not None:
                prepared, added = prepared.split([self.own, len(prepared) - self.own])
                self.added_biases[slot] = added.to(self.get_parameter("weight").device)
        super().install(parameter, slot, prepared)

    @property
    def widest(self) -> int:
        """The longest vocabulary of the batch."""
        segments = self.rows.segments
        return self.own if segments is None else max((self.widths[slot] for slot in segments.rows), default=self.own)

    def forward(self, x: Tensor) -> Tensor:
        segments, widest = self.rows.segments, self.widest
        if segments is None or widest == self.own:
            return super().forward(x)
        y = x.new_full((x.shape[-2], widest), -math.inf)
        for slot, rows in segments.rows.items():
            y[rows, self.own : self.widths[slot]] = self.added_biases.get(slot, 0)
        self.siblings.backend.linear_(y, x[0], self.siblings.layers, segments)
        return y[None]


class DeltaEmbedding(nn.Module):
    """An embedding. Ids beyond the base's rows are a variant's added vocabulary: there the base counts as zero."""

    rows: Rows
    backend: Backend
    weights: MutableSequence[Prepared | None]
    num_embeddings: int

    def adopt(self, rows: Rows, slots: int, backend: Backend) -> None:
        self.rows, self.backend = rows, backend
        self.weights = backend.slots([None] * slots)

    def shape_of(self, parameter: str) -> tuple[int, ...]:
        return tuple(self.get_parameter(parameter).shape)

    def prepare(self, delta: Delta, lay_out: LayOut) -> Prepared:
        return lay_out(delta)

    def install(self, parameter: str, slot: int, prepared: Prepared | None) -> None:
        self.weights[slot] = prepared

    def forward(self, ids: Tensor) -> Tensor:
        segments = self.rows.segments
        if segments is None:
            return super().forward(ids)
        flat = ids.reshape(-1).long()
        y: Tensor = super().forward(flat.clamp(max=self.num_embeddings - 1))
        y.masked_fill_((flat >= self.num_embeddings)[:, None], 0)
        self.backend.delta_embedding_(y, flat, self.weights, segments)
        return y.view(*ids.shape, -1)


DeltaLayer = DeltaLinear | DeltaEmbedding | DeltaNorm


def twin_of(module: nn.Module, *, is_head: bool = False) -> type | None:
    """Which twin a module can become; None if there is none for its kind."""
    if type(module) in (nn.Linear, Conv1D):
        return DeltaHead if is_head else DeltaLinear
    if type(module) is nn.Embedding:
        return DeltaEmbedding
    parameters = dict(module.named_parameters())
    is_norm = bool(parameters) and all(name in ("weight", "bias") and p.ndim == 1 for name, p in parameters.items())
    return DeltaNorm if is_norm and len(inspect.signature(module.forward).parameters) == 1 else None


def become(module: nn.Module, twin: type, rows: Rows, slots: int, backend: Backend) -> None:
    """Turn ``module`` into its twin, in place."""
    module.__class__ = type(f"Delta{type(module).__name__}", (twin, type(module)), {})
    module.adopt(rows, slots, backend)  # type: ignore[operator]


def unite(family: Sequence[DeltaLinear], slots: int, backend: Backend, *, copies: bool = False) -> None:
    """Let linear layers that the model calls in a row with the same input be computed at once; one alone as well.

    ``copies``: their weights may be kept twice where that is faster.
    """
    siblings = Siblings(family, slots, backend, copies=copies)
    for member, layer in enumerate(family):
        layer.siblings, layer.member = siblings, member
