"""Random drop: each block of rows keeps columns that a seed draws, so no mask is stored."""

from collections.abc import Iterator

from deltaserve.delta_store.codec import encode
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.pruning.weights import BaseFacts, Weight
from deltaserve.delta_store.pruning.whole import Encoded


def dare(weight: Weight, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    """Random drop: each block keeps one random column of every stratum; survivors are divided by their probability."""
    yield _dropped(weight, options, "uniform", facts)


def darex(weight: Weight, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    """DARE, whose survivors are afterwards divided by the q that a search finds best (``darex.py``)."""
    yield from dare(weight, options, facts)


def weighted(weight: Weight, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    """Random drop that keeps columns in proportion to the strength of their inputs; unbiased all the same.

    A weight that the profile's text did not reach is dropped uniformly.
    """
    known = facts.profile is not None and weight.name in facts.profile
    yield _dropped(weight, options, "weighted" if known else "uniform", facts)


def kept_columns(weight: Weight, options: Options) -> int:
    """How many columns of ``weight`` a block keeps; 0 where it has fewer rows than a block, or is too narrow."""
    out, width = weight.matrix.shape
    return 0 if out < options.block else round((1 - options.drop) * width)


def _dropped(weight: Weight, options: Options, mask: str, facts: BaseFacts) -> Encoded:
    kept = kept_columns(weight, options)
    if not kept:
        return weight.whole(options)
    spec = weight.sparse_spec(mask, kept, options)
    return spec, encode.seeded_sparse(weight.matrix, spec, weight.name, facts.profile)
