"""Tensors that are not pruned: norms and biases, embeddings and output heads, exact low rank."""

from collections.abc import Iterator

import torch
from torch import Tensor

from deltaserve.delta_store.codec import encode
from deltaserve.delta_store.codec.parts import Stored
from deltaserve.delta_store.codec.specs import Codec, DenseSpec, LowRankSpec, RowsSpec, Spec
from deltaserve.delta_store.delta import TensorDelta
from deltaserve.kernels.codes import FLOAT_CODECS

GROUP = 64
"""Values that share a scale, about; a multiple of every block."""

OVERSAMPLING = 8
POWER_ITERATIONS = 4

Encoded = tuple[Spec, Stored]


def difference(delta: TensorDelta) -> Tensor:
    """Fine-tuned minus base in float32, ``[out, in]`` or ``[n]``; what the base has no row for counts whole."""
    result = delta.raw[1].to(torch.float32, copy=True)
    result[: len(delta.raw[0])] -= delta.base
    return result.T if delta.transposed else result


def dense(values: Tensor, codec: Codec, *, transposed: bool = False) -> Encoded:
    """Every value of ``[out, in]`` or ``[n]``."""
    spec = DenseSpec(shape=shape_of(values), transposed=transposed, codec=codec, group=group_of(codec))
    return spec, encode.dense(values, spec)


def low_rank(a: Tensor, b: Tensor, codec: Codec, *, transposed: bool = False) -> Encoded:
    """``b @ a`` from ``a`` ``[r, in]`` and ``b`` ``[out, r]``."""
    rank, width = a.shape
    group = group_of(codec, rank)
    spec = LowRankSpec(shape=(len(b), width), transposed=transposed, rank=rank, codec=codec, group=group)
    return spec, encode.low_rank(a, b, spec)


def embedding(delta: TensorDelta, rank: int, codec: Codec) -> Iterator[Encoded]:
    """The mean row, the ``rank`` strongest directions around it in ``codec``, and rows added to the vocabulary exactly.

    Adam moves every row of an embedding, also those of tokens it never saw, along few common directions.
    """
    base_rows, width = delta.raw[0].shape
    whole = difference(delta)
    matrix, added = whole[:base_rows], whole[base_rows:]
    mean = matrix.mean(0)
    spec = RowsSpec(
        shape=(base_rows + len(added), width),
        base_rows=base_rows,
        count=len(added),
        codec=exact_codec(added),
        has_mean=True,
    )
    yield spec, encode.rows(added, torch.arange(base_rows, spec.shape[0]), mean, spec)
    if rank := min(rank, base_rows, width):
        a, b = strongest(matrix.sub_(mean), rank)
        yield low_rank(a, torch.cat([b, b.new_zeros(len(added), rank)]), codec)


def strongest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``a`` ``[r, in]`` and ``b`` ``[out, r]``, whose product is about the nearest of that rank to ``matrix``.

    Halko et al. 2009 (arXiv:0909.4061), algorithms 4.4 and 5.1, as ``torch.svd_lowrank``; but that draws from the
    generator of the whole process, whose seed would have to be set and set back. The same on every machine up to
    rounding, not bit for bit.
    """
    tall = matrix if len(matrix) >= matrix.shape[1] else matrix.T
    drawn = rank + OVERSAMPLING + -rank % 4  # products of nine columns take three times as long as those of twelve
    drawn = min(drawn, *matrix.shape)
    basis = _orthonormal(tall @ torch.randn(tall.shape[1], drawn, generator=torch.Generator().manual_seed(0)))
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(tall @ _orthonormal(tall.T @ basis))
    u, s, v = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    u, s, v = basis @ u[:, :rank], s[:rank, None], v[:rank]
    return (s * v, u) if tall is matrix else (s * u.T, v.T)


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q


def exact_codec(*tensors: Tensor) -> Codec:
    """The smaller float codec that holds these float32 values exactly."""
    return "bf16" if all(torch.equal(values.bfloat16().float(), values) for values in tensors) else "float32"


def group_of(codec: Codec, unit: int = 1) -> int:
    """How many values share a scale: about ``GROUP`` and a multiple of ``unit``. The float codecs have no scales."""
    return 1 if codec in FLOAT_CODECS else unit * max(1, GROUP // unit)


def shape_of(values: Tensor) -> tuple[int, int] | tuple[int]:
    """The shape as specifications have it: of a matrix or a vector."""
    match tuple(values.shape):
        case (rows, columns):
            return rows, columns
        case (size,):
            return (size,)
        case shape:
            raise ValueError(f"a parameter of shape {shape} is neither a matrix nor a vector")
