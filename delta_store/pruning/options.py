"""What a user may choose about a method: checked once, before any work, and written into the artifact."""

from dataclasses import dataclass

from deltaserve.delta_store.codec.specs import Codec
from deltaserve.delta_store.errors import OptionError
from deltaserve.kernels.codes import BITS

BLOCKS = (1, 4, 8, 16, 32, 64)
CODECS = tuple(BITS)
SEED_LIMIT = 1 << 63

Value = float | int | str


@dataclass(frozen=True, slots=True)
class Options:
    """One method's settings. A method that does not take an option leaves it as it is here.

    ``drop`` is p, the fraction of a weight that is pruned. ``block`` rows share their columns (V). ``codec`` stores the
    survivors. ``seed`` draws the columns. ``rank`` is the embeddings' and the output head's.
    """

    drop: float = 0.0
    block: int = 1
    codec: Codec = "float32"
    seed: int = 0
    rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise OptionError(f"drop is {self.drop}; it is the fraction pruned, from 0 to below 1 (0.98 keeps 2 %)")
        if self.block not in BLOCKS:
            raise OptionError(f"block is {self.block}; it can be {_listed(BLOCKS)}")
        if self.codec not in CODECS:
            raise OptionError(f"Unknown codec {self.codec!r}; known are: {_listed(CODECS)}")
        if not 0 <= self.seed < SEED_LIMIT:
            raise OptionError(f"seed is {self.seed}; it can be 0 to 2**63 - 1")
        if not 0 <= self.rank <= 256:
            raise OptionError(f"rank is {self.rank}; it can be 0 (the mean row alone) to 256")


def _listed(values: tuple[Value, ...]) -> str:
    return ", ".join(map(str, values))
