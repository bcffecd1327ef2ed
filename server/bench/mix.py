"""Which model each request asks for: the popularity mixes that papers on serving many variants measure with."""

import random
from collections.abc import Callable, Sequence
from itertools import cycle, islice

from deltaserve.delta_store.errors import OptionError

# Mix -> the weight of the model at a rank (0 is the most popular). Skewed is Punica's (arXiv 2310.18547): each model is
# asked for 1.5 times as often as the next one; zipf has the longer tail of 1 / rank.
WEIGHTS: dict[str, Callable[[int], float]] = {
    "uniform": lambda rank: 1.0,
    "zipf": lambda rank: 1.0 / (rank + 1),
    "skewed": lambda rank: 1.5**-rank,
    "identical": lambda rank: float(rank == 0),
}
MIXES = ("distinct", *WEIGHTS)


def assign(mix: str, models: Sequence[str], requests: int, seed: int) -> list[str]:
    """The model of each of ``requests`` requests; ``models`` are ordered from the most to the least popular.

    ``distinct`` goes round the models in order, so that neighbours differ as long as there are models enough; the other
    mixes draw independently. The same seed gives the same list.
    """
    if mix not in MIXES:
        raise OptionError(f"mix {mix!r} is unknown; choose one of {', '.join(MIXES)}")
    if not models:
        raise OptionError("there is no model to ask; name some with --models")
    if mix == "distinct":
        return list(islice(cycle(models), requests))
    weights = [WEIGHTS[mix](rank) for rank in range(len(models))]
    return random.Random(seed).choices(models, weights, k=requests)
