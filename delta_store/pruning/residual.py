"""Sums of two methods: what the first leaves out of a weight's delta, the second drops at random and adds.

Whatever the first keeps, the sum is unbiased: its mean over the seeds is the delta. Weighted drop has no such sum: it
is unbiased alone, and a draw from what it leaves out would multiply its variance by about the inverse of the density.
"""

from collections.abc import Iterator
from dataclasses import replace

from deltaserve.delta_store.pruning.dense import dense
from deltaserve.delta_store.pruning.low_rank import low_rank
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.pruning.random_drop import weighted
from deltaserve.delta_store.pruning.weights import BaseFacts, Prune, Weight
from deltaserve.delta_store.pruning.whole import Encoded
from deltaserve.kernels.parts import Delta, Part
from deltaserve.kernels.reference import unpack


def low_rank_residual(weight: Weight, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    """The strongest directions as ``low-rank`` keeps them, and the rest of the delta by weighted drop."""
    yield from _with_residual(low_rank, weight, options, facts)


def dense_residual(weight: Weight, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    """Every value in few bits as ``dense`` keeps it, and what rounding left out by weighted drop."""
    yield from _with_residual(dense, weight, options, facts)


def _with_residual(first: Prune, weight: Weight, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    remainder = weight.matrix.clone()
    for spec, part in first(weight, options, facts):
        yield spec, part
        if isinstance(part, Part):
            remainder -= unpack(Delta(spec.shape, (part,)))
    yield from weighted(replace(weight, matrix=remainder), options, facts)
