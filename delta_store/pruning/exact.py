"""Methods that lose nothing: an adapter's own factors, and the fine-tune's bits."""

from collections.abc import Iterator

from deltaserve.delta_store.codec.xor import xor
from deltaserve.delta_store.fine_tune import Change
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.pruning.weights import BaseFacts
from deltaserve.delta_store.pruning.whole import Encoded, dense, difference, exact_codec, low_rank


def lora(change: Change, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    """An adapter's own factors; what it trained in full is stored in full. All of it exactly."""
    if change.factors is not None:
        yield low_rank(*change.factors, exact_codec(*change.factors), transposed=change.transposed)
    else:
        values = difference(change.read())
        yield dense(values, exact_codec(values), transposed=change.transposed)


def lossless(change: Change, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
    """The fine-tune's bits XOR the base's, compressed: everything comes back bit for bit."""
    base, fine = (tensor.T if change.transposed else tensor for tensor in change.read().raw)
    yield xor(base, fine, transposed=change.transposed)
