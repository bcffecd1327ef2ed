"""What a user may choose about a method: checked once, before any work, and written into the artifact."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltaserve.delta_store.codec.specs import Codec
from deltaserve.delta_store.errors import OptionError
from deltaserve.kernels.codes import BITS

BLOCKS = (1, 4, 8, 16, 32, 64)
CODECS = tuple(BITS)
JUDGES = ("output", "labels")
SCOPES = ("model", "layer")
UNITS = ("rows", "columns", "heads")
SEED_LIMIT = 1 << 63
RANK_LIMIT = 256

Value = float | int | str


@dataclass(frozen=True, slots=True)
class Options:
    """One method's settings. A method that does not take an option leaves it as it is here.

    ``drop`` is p, the fraction of a weight that is pruned. ``block`` rows share their columns (V). ``codec`` stores the
    survivors. ``seed`` draws what is kept. ``rank`` is the embeddings' and the output head's, in ``embedding_codec``;
    ``linear_rank`` is that of the linear weights. ``whole_codec`` stores norms, biases and weights too small to prune.
    DAREx searches one q ``per`` model or layer, with the loss on labels or the change of the output
    as its ``judge``. Structural pruning keeps whole ``unit``\\ s.
    """

    drop: float = 0.0
    block: int = 1
    codec: Codec = "float32"
    seed: int = 0
    rank: int = 0
    embedding_codec: Codec = "int8"
    whole_codec: Codec = "bf16"
    linear_rank: int = 1
    judge: str = "output"
    per: str = "model"
    unit: str = "rows"

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise OptionError(f"drop is {self.drop}; it is the fraction pruned, from 0 to below 1 (0.98 keeps 2 %)")
        for name, codec in (
            ("codec", self.codec),
            ("embedding_codec", self.embedding_codec),
            ("whole_codec", self.whole_codec),
        ):
            if codec not in CODECS:
                raise OptionError(f"Unknown {name} {codec!r}; known are: {_listed(CODECS)}")
        if not 0 <= self.seed < SEED_LIMIT:
            raise OptionError(f"seed is {self.seed}; it can be 0 to 2**63 - 1")
        if not 0 <= self.rank <= RANK_LIMIT:
            raise OptionError(f"rank is {self.rank}; it can be 0 (the mean row alone) to {RANK_LIMIT}")
        if not 1 <= self.linear_rank <= RANK_LIMIT:
            raise OptionError(f"linear_rank is {self.linear_rank}; it can be 1 to {RANK_LIMIT}")
        _check_choice("block", self.block, BLOCKS)
        _check_choice("judge", self.judge, JUDGES)
        _check_choice("per", self.per, SCOPES)
        _check_choice("unit", self.unit, UNITS)


def _check_choice(name: str, value: Value, choices: Sequence[Value]) -> None:
    if value not in choices:
        raise OptionError(f"{name} is {value}; it can be {_listed(choices)}")


def _listed(values: Sequence[Value]) -> str:
    return ", ".join(map(str, values))
