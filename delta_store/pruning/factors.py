"""An adapter's factors pruned, each for itself: smaller than the product of the two, however high its rank."""

from collections.abc import Iterator

from deltaserve.delta_store.codec import encode
from deltaserve.delta_store.codec.specs import FactorsSpec
from deltaserve.delta_store.fine_tune import Change
from deltaserve.delta_store.pruning.exact import lora
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.pruning.weights import BaseFacts
from deltaserve.delta_store.pruning.whole import Encoded, group_of


def lora_darex(change: Change, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    """An adapter's factors with numbers dropped at random from both; their product is unbiased, as the draws are two.

    Afterwards the product is divided as in ``darex``. What the adapter trained in full is stored in full.
    """
    if change.factors is None:
        yield from lora(change, options, facts)
        return
    a, b = change.factors
    (rank, width), out = a.shape, len(b)
    kept_a, kept_b = (max(1, round((1 - options.drop) * side)) for side in (width, out))
    spec = FactorsSpec(
        shape=(out, width),
        transposed=change.transposed,
        rank=rank,
        kept_a=kept_a,
        kept_b=kept_b,
        codec=options.codec,
        group=group_of(options.codec),
        seed=options.seed,
        divisor=kept_a / width,
    )
    yield spec, encode.sparse_factors(a, b, spec, change.name)
