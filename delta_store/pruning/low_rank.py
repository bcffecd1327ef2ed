"""Low rank: the few directions in which a weight's delta moves its outputs most."""

from collections.abc import Iterator

from deltaserve.delta_store.codec.specs import Codec
from deltaserve.delta_store.pruning import whole
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.pruning.weights import BaseFacts, Weight
from deltaserve.delta_store.pruning.whole import Encoded, strongest

FACTOR_CODEC: Codec = "int8"


def low_rank(weight: Weight, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    """Keep the ``linear_rank`` strongest directions, inputs counted by their RMS (an activation-aware SVD), in int8.

    A weight that the profile's text did not reach gets an ordinary SVD.
    """
    rank = min(options.linear_rank, *weight.matrix.shape)
    strength = weight.input_strength(facts)
    if strength is None:
        a, b = strongest(weight.matrix, rank)
    else:
        a, b = strongest(weight.matrix * strength, rank)
        a = a / strength
    yield whole.low_rank(a, b, FACTOR_CODEC, transposed=weight.transposed)
