"""Importance: each block keeps the columns that matter most, whose indices are stored.

What is kept is less than the delta, and always too little in the same direction. So survivors are enlarged until their
product with the delta is the delta's with itself: in each block, or where inputs count, in the outputs on text.
"""

from collections.abc import Iterator

import numpy as np
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
    """Keep the columns in which a block's delta is largest, enlarged to the block's energy."""
    kept = kept_columns(weight, options)
    if not kept:
        yield weight.whole(options)
        return
    spec = weight.sparse_spec("explicit", kept, options)
    energy = _block_energy(weight.matrix, spec)
    columns = _largest(energy, kept)
    missing = energy.sum(1) / energy.gather(1, columns).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    enlarged = weight.matrix * missing.clamp_min(1).repeat_interleave(spec.block)[: spec.shape[0], None]
    yield spec, encode.explicit_sparse(enlarged, spec, columns)


def wanda(weight: Weight, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    """Keep the columns whose contribution to the output is largest: delta times the RMS of the input.

    Enlarged afterwards (``output_scale.py``): in strong columns the delta itself is small, and enlarging it to the
    block's energy would overshoot by far. A weight that the profile's text did not reach is pruned by magnitude.
    """
    kept, strength = kept_columns(weight, options), weight.input_strength(facts)
    if strength is None or not kept:
        yield from magnitude(weight, options, facts)
        return
    spec = weight.sparse_spec("explicit", kept, options)
    columns = _largest(_block_energy(weight.matrix * strength, spec), kept)
    yield spec, encode.explicit_sparse(weight.matrix, spec, columns)


def _block_energy(matrix: Tensor, spec: SparseSpec) -> Tensor:
    """float32 ``[blocks, in]``: the sum of squares of each block's column."""
    whole = pad(matrix, (0, 0, 0, spec.padding)) if spec.padding else matrix
    return whole.reshape(spec.blocks, spec.block, -1).square().sum(1)


def _largest(energy: Tensor, kept: int) -> Tensor:
    """int64 ``[blocks, kept]``, ascending; of equals those to the left, on every machine."""
    least = torch.from_numpy(np.partition(energy.numpy(), -kept, axis=1)[:, -kept, None])  # torch's sorts all of them
    larger, equal = energy > least, energy == least
    fits = equal.cumsum(1) <= kept - larger.sum(1, keepdim=True)
    return (larger | equal & fits).nonzero()[:, 1].view(-1, kept)
