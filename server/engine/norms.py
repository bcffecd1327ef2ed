"""The delta-aware twin of a norm: every row is multiplied by its own variant's vectors."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deltaserve.kernels import reference
from deltaserve.kernels.dispatch import Backend
from deltaserve.kernels.parts import Delta
from deltaserve.kernels.segments import BASE
from deltaserve.server.engine.routing import Rows

Formula = tuple[float, float]
"""epsilon and offset of ``(weight + offset) * x / sqrt(mean(x**2) + epsilon)``."""


class DeltaNorm(nn.Module):
    """A norm of any family: one whose parameters are vectors and whose forward takes one tensor.

    ``tables[parameter]`` ``[1 + slots, n]`` holds the vector of rows that are nobody's (the base's, or that of the
    variant that is swapped in) and, by slot, each variant's own. A norm by the root of the mean square, known by what
    it computes, is one kernel. Of the others, most only multiply by the weight, so all rows run at once with a vector
    each. The rest (LayerNorm's fused kernel) run once a variant; or, where only the device knows whose a row is,
    without their vectors, which come last (``is_affine``).
    """

    rows: Rows
    backend: Backend
    base: dict[str, Tensor]
    tables: dict[str, Tensor]
    formula: Formula | None
    takes_a_vector_each_row: bool
    is_affine: bool

    def adopt(self, rows: Rows, slots: int, backend: Backend) -> None:
        self.rows, self.backend = rows, backend
        vectors = {name: vector.detach() for name, vector in self.named_parameters()}
        self.formula = _formula(super().forward, self, vectors)
        self.takes_a_vector_each_row = _takes_a_vector_each_row(super().forward, self, vectors)
        self.is_affine = _is_affine(super().forward, self, vectors)
        self.base = {name: vector.clone() for name, vector in vectors.items()}
        self.tables = {name: vector.repeat(slots + 1, 1) for name, vector in vectors.items()}

    def shape_of(self, parameter: str) -> tuple[int, ...]:
        return tuple(self.get_parameter(parameter).shape)

    def prepare(self, delta: Delta, lay_out: object = None) -> Tensor:
        return reference.unpack(delta)

    def install(self, parameter: str, slot: int, prepared: Tensor | None) -> None:
        base = self.base[parameter]
        own = base if prepared is None else (base.float() + prepared.to(base.device)).to(base.dtype)
        self.tables[parameter][slot - BASE] = own

    @torch.no_grad()
    def alter(self, parameter: str, slot: int) -> None:
        """For all rows: the vector becomes that of the slot's variant, or with ``BASE`` the base's again."""
        table = self.tables[parameter]
        table[0] = self.base[parameter] if slot == BASE else table[slot - BASE]
        self.get_parameter(parameter).copy_(table[0])

    def forward(self, x: Tensor) -> Tensor:
        segments = self.rows.segments
        if self.formula is not None:
            return self._by_formula(x, self.formula)
        if segments is None:
            return super().forward(x)
        flat = _by_row(x)
        if self.takes_a_vector_each_row or (self.rows.table is not None and self.is_affine):
            places = self.rows.places
            vectors = {name: _spread(table.index_select(0, places), flat) for name, table in self.tables.items()}
            compute = _with_parameters if self.takes_a_vector_each_row else _affine
            return compute(self, vectors, super().forward, flat).view_as(x)
        y: Tensor = super().forward(flat)
        for slot, rows in segments.rows.items():
            vectors = {name: table[slot - BASE] for name, table in self.tables.items()}
            y[rows] = _with_parameters(self, vectors, super().forward, flat[rows])
        return y.view_as(x)

    def _by_formula(self, x: Tensor, formula: Formula) -> Tensor:
        if self.rows.segments is None:
            weight = self.get_parameter("weight").detach()[None]
            return self.backend.rms_norm(x.reshape(-1, x.shape[-1]), weight, None, *formula).view_as(x)
        return self.backend.rms_norm(_by_row(x), self.tables["weight"], self.rows.places, *formula).view_as(x)


def can_be_captured(model: nn.Module) -> bool:
    """Whether the same launches serve all variants, for each norm of a model whose layers are twins."""
    norms = [module for module in model.modules() if isinstance(module, DeltaNorm)]
    return all(norm.formula is not None or norm.takes_a_vector_each_row or norm.is_affine for norm in norms)


def _takes_a_vector_each_row(forward: Callable[[Tensor], Tensor], norm: nn.Module, vectors: dict[str, Tensor]) -> bool:
    """Whether two rows with a vector each come out, bit for bit, as one row at a time does with its vector."""
    x = torch.linspace(-1, 1, 2 * vectors["weight"].numel()).view(2, -1).to(vectors["weight"])
    each = {name: torch.stack([vector, vector + 1]) for name, vector in vectors.items()}
    try:
        together = _with_parameters(norm, each, forward, x)
    except (RuntimeError, ValueError):
        return False
    alone = [_with_parameters(norm, {n: v[i] for n, v in each.items()}, forward, x[i : i + 1]) for i in range(2)]
    return torch.equal(together, torch.cat(alone))


def _is_affine(forward: Callable[[Tensor], Tensor], norm: nn.Module, vectors: dict[str, Tensor]) -> bool:
    """Whether the norm multiplies by its weight, and adds its bias, last of all."""
    x = torch.linspace(-1, 1, 2 * vectors["weight"].numel(), device=vectors["weight"].device).view(2, -1)
    vectors = {name: vector.float() + 0.5 for name, vector in vectors.items()}
    try:
        own = _with_parameters(norm, vectors, forward, x)
        return torch.allclose(_affine(norm, vectors, forward, x), own, rtol=1e-4, atol=1e-5)
    except (RuntimeError, ValueError):
        return False


def _affine(norm: nn.Module, vectors: dict[str, Tensor], forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``forward`` with these vectors, which rows may have of their own, in float32, in the dtype of ``x``."""
    width = x.shape[-1]
    plain = {name: torch.full((width,), float(name == "weight"), device=x.device) for name in vectors}
    y = _with_parameters(norm, plain, forward, x.float()) * vectors["weight"].float()
    return (y + vectors["bias"].float() if "bias" in vectors else y).to(x.dtype)


def _with_parameters(
    module: nn.Module, vectors: dict[str, Tensor], forward: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """``forward(x)`` as if these were the module's parameters; only the generation thread runs the model."""
    own = dict(module._parameters)
    module._parameters.update(vectors)  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            return forward(x)
    finally:
        module._parameters.update(own)


def _by_row(x: Tensor) -> Tensor:
    """``[rows, .., n]`` of ``[texts, rows of each, .., n]``; that of single rows, ``[rows, n]``, as it is."""
    return x.flatten(0, 1) if x.ndim > 2 else x


def _spread(vectors: Tensor, like: Tensor) -> Tensor:
    """``[rows, n]`` as ``[rows, 1, .., n]``: heads of a row share its vector."""
    return vectors.view(len(vectors), *[1] * (like.ndim - 2), -1)


def _formula(forward: Callable[[Tensor], Tensor], norm: nn.Module, vectors: dict[str, Tensor]) -> Formula | None:
    """That of a float32 root-mean-square norm, found by comparison; None for any other norm."""
    if set(vectors) != {"weight"} or vectors["weight"].dtype != torch.float32:
        return None
    n, on = vectors["weight"].numel(), vectors["weight"].device
    weight = torch.linspace(-1, 2, n, device=on)
    x = torch.stack([torch.linspace(-1, 1.5, n), torch.linspace(2e-3, -1e-3, n)]).to(on)  # where epsilon counts, too
    own = _with_parameters(norm, {"weight": weight}, forward, x)
    for epsilon in (getattr(norm, name, None) for name in ("variance_epsilon", "eps")):
        for offset in (0.0, 1.0):
            if epsilon is not None and torch.allclose(
                reference.rms_norm(x, weight[None], None, epsilon, offset), own, rtol=1e-5, atol=1e-6
            ):
                return float(epsilon), offset
    return None
