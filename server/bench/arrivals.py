"""When the requests of an open loop are due: so many a second, whatever the server does."""

import numpy as np


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds after the start at which each of ``count`` requests is due, ``rate`` a second on average.

    The intervals follow a gamma distribution with shape ``burstiness``, as in ``vllm bench serve``: 1 is a Poisson
    process; less comes in bursts, more is steadier.
    """
    generator = np.random.default_rng(seed)
    return np.cumsum(generator.gamma(burstiness, 1.0 / (rate * burstiness), size=count)).tolist()
