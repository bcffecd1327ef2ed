"""Nothing dropped, few bits: every value of a weight's delta is quantised, with a scale a row."""

from collections.abc import Iterator

from deltaserve.delta_store.codec import encode
from deltaserve.delta_store.codec.encode import row_group
from deltaserve.delta_store.codec.specs import DenseSpec
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.pruning.weights import BaseFacts, Weight
from deltaserve.delta_store.pruning.whole import Encoded, shape_of


def dense(weight: Weight, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    """Keep every value in few bits: of one bit its sign alone, times a scale a row that keeps the projection."""
    group = row_group(options.codec, weight.matrix.shape[1])
    spec = DenseSpec(shape=shape_of(weight.matrix), transposed=weight.transposed, codec=options.codec, group=group)
    yield spec, encode.dense(weight.matrix, spec)
