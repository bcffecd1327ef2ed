"""From float values to the part that a specification describes: what every pruning method ends with."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltaserve.delta_store.codec.columns import ColumnWeights, explicit_factors, seeded_columns
from deltaserve.delta_store.codec.specs import DenseSpec, FactorsSpec, LowRankSpec, RowsSpec, SparseSpec
from deltaserve.delta_store.codec.values import quantise
from deltaserve.kernels.codes import FLOAT_CODECS
from deltaserve.kernels.parts import Dense, LowRank, Rows, Sparse


def seeded_sparse(delta: Tensor, spec: SparseSpec, name: str, profile: ColumnWeights | None = None) -> Sparse:
    """The survivors of ``delta`` ``[out, in]`` under the seeded mask of ``spec`` for parameter ``name``."""
    return _sparse(delta, spec, *seeded_columns(spec, name, profile))


def explicit_sparse(delta: Tensor, spec: SparseSpec, columns: Tensor) -> Sparse:
    """The survivors of ``delta`` ``[out, in]`` at ``columns`` ``[blocks, kept]``, ascending in each block."""
    return _sparse(delta, spec, columns.int(), explicit_factors(spec))


def low_rank(a: Tensor, b: Tensor, spec: LowRankSpec) -> LowRank:
    """``b @ a`` with ``a`` ``[r, in]`` and ``b`` ``[out, r]``.

    Where they are quantised, the columns of ``b`` are first brought to one size (``a`` takes the rest), because they
    share scales, while each row of ``a`` has its own.
    """
    a, b = a.float(), b.float()
    if spec.codec not in FLOAT_CODECS:
        sizes = b.abs().amax(0)
        sizes = torch.where(sizes == 0, 1.0, sizes)
        a, b = a * sizes[:, None], b / sizes
    a_codes = quantise(a, spec.codec, row_group(spec.codec, a.shape[1]))
    return LowRank(spec.shape, a_codes, quantise(b, spec.codec, spec.group))


@dataclass(frozen=True, slots=True, eq=False)
class SparseFactors:
    """Two pruned factors as they are stored: ``a`` ``[r, in]``, ``b`` transposed ``[r, out]``. Decoded, a LowRank."""

    a: Sparse
    b: Sparse


def sparse_factors(a: Tensor, b: Tensor, spec: FactorsSpec, name: str) -> SparseFactors:
    """The survivors of ``a`` ``[r, in]`` and ``b`` ``[out, r]`` for parameter ``name``."""
    return SparseFactors(seeded_sparse(a, spec.a, f"{name}:a"), seeded_sparse(b.T, spec.b, f"{name}:b"))


def dense(values: Tensor, spec: DenseSpec) -> Dense:
    """Every value, ``[out, in]`` or ``[n]``."""
    return Dense(spec.shape, quantise(values, spec.codec, spec.group))


def rows(values: Tensor, ids: Tensor, mean: Tensor | None, spec: RowsSpec) -> Rows:
    """Row ``ids[i]`` (ascending) holds ``values[i]`` of ``[n, in]``, other rows of the base hold ``mean`` ``[in]``."""
    codes = quantise(values, spec.codec, row_group(spec.codec, spec.shape[1]))
    return Rows(spec.shape, ids.long(), codes, None if mean is None else mean.float(), spec.base_rows)


def row_group(codec: str, width: int) -> int:
    """The group of values with a scale a row; the float codecs have none."""
    return 1 if codec in FLOAT_CODECS else width


def _sparse(delta: Tensor, spec: SparseSpec, columns: Tensor, factors: Tensor) -> Sparse:
    whole = pad(delta.float(), (0, 0, 0, spec.padding)) if spec.padding else delta.float()
    blocks = whole.reshape(spec.blocks, spec.block, -1)
    at = columns.long()[:, None, :].expand(-1, spec.block, -1)
    values = blocks.gather(2, at).transpose(1, 2)
    return Sparse(spec.shape, columns, quantise(values, spec.codec, spec.group, spec.padding), factors)
