"""Which model each request asks for: the popularity mixes that papers on serving many variants measure with."""

import random
from collections.abc import Callable, Sequence
from itertools import cycle, islice

from deltaserve.delta_store.errors import OptionError

# Mix -> the weight of the model at a rank (0 is the most popular), given zipf's exponent. Skewed is Punica's
# (arXiv 2310.18547): each model is asked for 1.5 times as often as the next one; zipf has the longer tail.
WEIGHTS: dict[str, Callable[[int, float], float]] = {
    "uniform": lambda rank, exponent: 1.0,
    "zipf": lambda rank, exponent: (rank + 1.0) ** -exponent,
    "skewed": lambda rank, exponent: 1.5**-rank,
    "identical": lambda rank, exponent: float(rank == 0),
}
MIXES = ("distinct", "rotation", *WEIGHTS)


def assign(
    mix: str, models: Sequence[str], requests: int, seed: int, *, at_once: int | None = None, exponent: float = 1.0
) -> list[str]:
    """The model of each of ``requests`` requests; ``models`` are ordered from the most to the least popular.

    ``distinct`` goes round the first ``at_once`` models, as many as are under way at a time: all differ, and none need
    ever leave memory. ``rotation`` goes round all of them: with more than a server holds, each has just been evicted
    when it is asked again. The others draw independently, zipf with weight 1 / rank ** ``exponent``. The same seed
    gives the same list.
    """
    if mix not in MIXES:
        raise OptionError(f"mix {mix!r} is unknown; choose one of {', '.join(MIXES)}")
    if not models:
        raise OptionError("there is no model to ask; name some with --models")
    if mix in ("distinct", "rotation"):
        return list(islice(cycle(models[:at_once] if mix == "distinct" else models), requests))
    weights = [WEIGHTS[mix](rank, exponent) for rank in range(len(models))]
    return random.Random(seed).choices(models, weights, k=requests)
