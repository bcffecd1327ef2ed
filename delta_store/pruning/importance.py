"""Importance: each block keeps the columns that matter most, whose indices are stored.

What is kept is less than the delta, and always too little in the same direction. So survivors are enlarged until their
product with the delta is the delta's with itself: in each block, ``<decoded, delta> = <delta, delta>``, or where inputs
were looked at, in the outputs that each weight adds on text, ``<decoded x, delta x> = <delta x, delta x>``.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.codec import encode
from deltaserve.delta_store.codec.artifact import Artifact
from deltaserve.delta_store.codec.specs import SparseSpec
from deltaserve.delta_store.fine_tune import FineTune
from deltaserve.delta_store.pruning.layer_inputs import look_at_inputs
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.pruning.random_drop import kept_columns
from deltaserve.delta_store.pruning.tuning import survivors
from deltaserve.delta_store.pruning.weights import BaseFacts, Weight
from deltaserve.delta_store.pruning.whole import Encoded
from deltaserve.delta_store.quality import full_model
from deltaserve.delta_store.text import Sample
from deltaserve.kernels.parts import Delta
from deltaserve.kernels.reference import unpack


def magnitude(weight: Weight, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    """Keep the columns in which a block's delta is largest, enlarged to the block's energy."""
    kept = kept_columns(weight, options)
    if not kept:
        yield weight.whole()
        return
    spec = weight.sparse_spec("explicit", kept, options)
    energy = _block_energy(weight.matrix, spec)
    columns = _largest(energy, kept)
    missing = energy.sum(1) / energy.gather(1, columns).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    enlarged = weight.matrix * missing.clamp_min(1).repeat_interleave(spec.block)[: spec.shape[0], None]
    yield spec, encode.explicit_sparse(enlarged, spec, columns)


def wanda(weight: Weight, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    """Keep the columns whose contribution to the output is largest: delta times the RMS of the input.

    Enlarged afterwards (``unbiased_outputs``): in strong columns the delta itself is small, and enlarging it to the
    block's energy would overshoot by far. A weight that the profile's text did not reach is pruned by magnitude.
    """
    kept, strength = kept_columns(weight, options), weight.input_strength(facts)
    if strength is None or not kept:
        yield from magnitude(weight, options, facts)
        return
    spec = weight.sparse_spec("explicit", kept, options)
    yield (
        spec,
        encode.explicit_sparse(weight.matrix, spec, _largest(_block_energy(weight.matrix * strength, spec), kept)),
    )


@torch.inference_mode()
def unbiased_outputs(
    base: Checkpoint,
    fine_tune: FineTune,
    artifact: Artifact,
    samples: Sequence[Sample],
    options: Options,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """For each pruned weight ``<decoded x, delta x> / <delta x, delta x>`` on the samples: divided by it, 1."""
    sums = dict.fromkeys(survivors(artifact), (0.0, 0.0))

    def look(name: str, x: Tensor, delta: Tensor) -> None:
        wanted = x @ delta
        got, full = sums[name]
        sums[name] = got + (x @ _decoded(artifact, name).T * wanted).sum().item(), full + wanted.square().sum().item()

    progress(0, 1)
    look_at_inputs(full_model(base, fine_tune), base, sums.keys(), samples, look)
    return {name: got / full if got > 0 and full > 0 else 1.0 for name, (got, full) in sums.items()}


def _block_energy(matrix: Tensor, spec: SparseSpec) -> Tensor:
    """float32 ``[blocks, in]``: the sum of squares of each block's column."""
    blocks = pad(matrix, (0, 0, 0, spec.padding)).view(spec.blocks, spec.block, -1)
    return blocks.square().sum(1)


def _largest(energy: Tensor, kept: int) -> Tensor:
    """int64 ``[blocks, kept]``, ascending; of equals those to the left, on every machine."""
    return energy.argsort(stable=True, dim=1, descending=True)[:, :kept].sort(1).values


def _decoded(artifact: Artifact, name: str) -> Tensor:
    """float32 ``[out, in]``: the pruned part of a delta."""
    delta = artifact.delta(name)
    return unpack(Delta(delta.shape, delta.parts[:1]))
