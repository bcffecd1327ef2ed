"""The methods: what each keeps of a delta. Adding one is adding a function and a row of ``METHODS``."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from deltaserve.delta_store.codec import encode
from deltaserve.delta_store.codec.specs import Codec, SparseSpec
from deltaserve.delta_store.codec.xor import xor
from deltaserve.delta_store.delta import TensorDelta
from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.fine_tune import Change
from deltaserve.delta_store.profile import Profile
from deltaserve.delta_store.pruning.options import Options, Value
from deltaserve.delta_store.pruning.whole import Encoded, dense, difference, embedding, exact_codec, group_of, low_rank

WHOLE_CODEC: Codec = "bf16"
"""Norms, biases and weights too small to prune."""

Function = Callable[[Change, Options, Profile | None], Iterator[Encoded]]
"""From a weight's change to the parts that stand for it."""


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table. ``defaults`` are the options that the method takes; ``source`` is where it is from."""

    name: str
    function: Function
    defaults: Mapping[str, Value]
    source: str
    prunes: bool = True
    needs_profile: bool = False
    for_adapters: bool = True
    for_checkpoints: bool = True

    def options(self, given: Mapping[str, Value]) -> Options:
        """The defaults with what was given in their place. Raises OptionError for what the method does not take."""
        if unknown := sorted(given.keys() - self.defaults.keys()):
            takes = ", ".join(self.defaults) or "no options"
            raise OptionError(f"The method {self.name} has no option {unknown[0]}; it takes: {takes}")
        return Options(**{**self.defaults, **given})  # type: ignore[arg-type]  # Options checks the values


def dare(change: Change, options: Options, profile: Profile | None) -> Iterator[Encoded]:
    """Random drop: each block keeps one random column of every stratum; survivors are divided by their probability."""
    yield from _pruned(change.read(), options, "uniform", None)


def weighted(change: Change, options: Options, profile: Profile | None) -> Iterator[Encoded]:
    """Random drop that keeps columns in proportion to the strength of their inputs; unbiased all the same.

    A weight that the profile's text did not reach is dropped uniformly.
    """
    known = profile is not None and change.name in profile
    yield from _pruned(change.read(), options, "weighted" if known else "uniform", profile)


def lora(change: Change, options: Options, profile: Profile | None) -> Iterator[Encoded]:
    """An adapter's own factors; what it trained in full is stored in full. All of it exactly."""
    if change.factors is not None:
        yield low_rank(*change.factors, exact_codec(*change.factors), transposed=change.transposed)
    else:
        values = difference(change.read())
        yield dense(values, exact_codec(values), transposed=change.transposed)


def lossless(change: Change, options: Options, profile: Profile | None) -> Iterator[Encoded]:
    """The fine-tune's bits XOR the base's, compressed: everything comes back bit for bit."""
    base, fine = (tensor.T if change.transposed else tensor for tensor in change.read().raw)
    yield xor(base, fine, transposed=change.transposed)


METHODS = {
    method.name: method
    for method in (
        Method(
            "weighted",
            weighted,
            {"drop": 0.98, "block": 16, "codec": "int2", "seed": 0, "rank": 4},
            "Horvitz and Thompson 1952, with the inputs' RMS as in Wanda (arXiv:2306.11695)",
            needs_profile=True,
        ),
        Method(
            "dare",
            dare,
            {"drop": 0.9, "block": 16, "codec": "int4", "seed": 0, "rank": 4},
            "DARE (arXiv:2311.03099), columns stratified",
        ),
        Method("lora", lora, {}, "LoRA (arXiv:2106.09685)", prunes=False, for_checkpoints=False),
        Method("lossless", lossless, {}, "BitX in ZipLLM (arXiv:2505.06252)", prunes=False, for_adapters=False),
    )
}


def method(name: str) -> Method:
    """The row of this name. Raises OptionError that lists the known ones."""
    if name not in METHODS:
        raise OptionError(f"Unknown method {name!r}; known are: {', '.join(METHODS)}")
    return METHODS[name]


def encode_change(
    method: Method, change: Change, options: Options, profile: Profile | None, embeddings: Collection[str]
) -> Iterator[Encoded]:
    """What the method makes of a change; those that prune leave ``embeddings`` (and output heads) to low rank."""
    if method.prunes and change.name in embeddings:
        yield from embedding(change.read(), options.rank)
    else:
        yield from method.function(change, options, profile)


def _pruned(delta: TensorDelta, options: Options, mask: str, profile: Profile | None) -> Iterator[Encoded]:
    matrix = difference(delta)
    if matrix.dim() == 1 or _is_small(matrix, options):
        yield dense(matrix, WHOLE_CODEC, transposed=delta.transposed)
        return
    out, width = matrix.shape
    kept = round((1 - options.drop) * width)
    spec = SparseSpec.model_validate(
        {
            "shape": (out, width),
            "transposed": delta.transposed,
            "mask": mask,
            "kept": kept,
            "block": options.block,
            "codec": options.codec,
            "group": group_of(options.codec, options.block),
            "seed": options.seed,
            "divisor": kept / width if mask == "uniform" else 1.0,
        }
    )
    yield spec, encode.seeded_sparse(matrix, spec, delta.name, profile)


def _is_small(matrix: Tensor, options: Options) -> bool:
    """Fewer rows than a block shares, or too narrow to keep a column."""
    out, width = matrix.shape
    return out < options.block or round((1 - options.drop) * width) < 1
