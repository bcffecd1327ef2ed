"""What a pruning method is given: one linear weight's delta, and what is known of the base.

Everything else of a fine-tune is the same for all of them: embeddings and output heads go to low rank, norms and
biases are kept whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps

from torch import Tensor

from deltaserve.delta_store.codec.specs import SparseSpec
from deltaserve.delta_store.fine_tune import Change
from deltaserve.delta_store.profile import Profile
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.pruning.whole import Encoded, dense, difference, embedding, group_of


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What methods know of the base beside its numbers.

    ``profile`` is there for methods that need it; ``embeddings`` are the weights that are looked up by row, and the
    output head; ``head_size`` is how many rows of a query weight belong to one attention head.
    """

    profile: Profile | None = None
    embeddings: frozenset[str] = frozenset()
    head_size: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """The delta of one linear layer: ``matrix`` float32 ``[out, in]``; ``transposed`` says how the base stores it."""

    name: str
    matrix: Tensor
    transposed: bool = False

    def input_strength(self, facts: BaseFacts) -> Tensor | None:
        """float32 ``[in]``: the inputs' RMS in some unit; None where the profile's text did not reach the layer."""
        if facts.profile is None or self.name not in facts.profile:
            return None
        return facts.profile.weights(self.name).float()

    def sparse_spec(self, mask: str, kept: int, options: Options) -> SparseSpec:
        """Blocks that keep ``kept`` columns; a uniform mask's survivors are divided by their probability."""
        out, width = self.matrix.shape
        return SparseSpec.model_validate(
            {
                "shape": (out, width),
                "transposed": self.transposed,
                "mask": mask,
                "kept": kept,
                "block": options.block,
                "codec": options.codec,
                "group": group_of(options.codec, options.block),
                "seed": None if mask == "explicit" else options.seed,
                "divisor": kept / width if mask == "uniform" else 1.0,
            }
        )

    def whole(self, options: Options) -> Encoded:
        """Nothing dropped: for what is too small to prune."""
        return dense(self.matrix, options.whole_codec, transposed=self.transposed)


Function = Callable[[Change, Options, BaseFacts], Iterator[Encoded]]
"""From a change to the parts that stand for it."""

Prune = Callable[[Weight, Options, BaseFacts], Iterator[Encoded]]
"""From a linear weight's delta to the parts that stand for it."""


def of_linears(prune: Prune) -> Function:
    """The method that prunes linear weights with ``prune``."""

    @wraps(prune)
    def method(change: Change, options: Options, facts: BaseFacts) -> Iterator[Encoded]:
        delta = change.read()
        if change.name in facts.embeddings:
            yield from embedding(delta, options.rank, options.embedding_codec)
            return
        weight = Weight(change.name, difference(delta), change.transposed)
        if weight.matrix.dim() == 1:
            yield weight.whole(options)
        else:
            yield from prune(weight, options, facts)

    return method
