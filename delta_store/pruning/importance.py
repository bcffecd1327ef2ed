"""Importance: each block keeps the columns that matter most, whose indices are stored.

What is kept is less than the delta, and always too little in the same direction. So a block's survivors are enlarged
until their product with the delta is the delta's with itself, ``<decoded, delta> = <delta, delta>``.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltaserve.delta_store.codec import encode
from deltaserve.delta_store.codec.specs import SparseSpec
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.pruning.random_drop import kept_columns
from deltaserve.delta_store.pruning.weights import BaseFacts, Weight
from deltaserve.delta_store.pruning.whole import Encoded


def magnitude(weight: Weight, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    """Keep the columns in which a block's delta is largest."""
    yield _most_important(weight, options, torch.ones(weight.matrix.shape[1]))


def wanda(weight: Weight, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    """Keep the columns whose contribution to the output is largest: delta times the RMS of the input.

    A weight that the profile's text did not reach is pruned by magnitude.
    """
    strength = weight.input_strength(facts)
    yield _most_important(weight, options, torch.ones(weight.matrix.shape[1]) if strength is None else strength)


def _most_important(weight: Weight, options: Options, strength: Tensor) -> Encoded:
    kept = kept_columns(weight, options)
    if not kept:
        return weight.whole()
    spec = weight.sparse_spec("explicit", kept, options)
    energy = _block_energy(weight.matrix, spec)
    # Stable, so that equals are kept from the left on every machine.
    columns = (energy * strength.square()).argsort(stable=True, dim=1, descending=True)[:, :kept].sort(1).values
    # Measured: an enlargement that counts energies times input strengths, too, has far more KL.
    missing = energy.sum(1) / energy.gather(1, columns).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    enlarged = weight.matrix * missing.clamp_min(1).repeat_interleave(spec.block)[: spec.shape[0], None]
    return spec, encode.explicit_sparse(enlarged, spec, columns)


def _block_energy(matrix: Tensor, spec: SparseSpec) -> Tensor:
    """float32 ``[blocks, in]``: the sum of squares of each block's column."""
    blocks = pad(matrix, (0, 0, 0, spec.padding)).view(spec.blocks, spec.block, -1)
    return blocks.square().sum(1)
