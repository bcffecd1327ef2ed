"""How torch's threads wait for work: the kernels share its pool, and give it some work every few dozen microseconds."""

import os
import sys

SPINS = 10_000
"""Some hundred microseconds: longer than any wait within a step, shorter than one notices between steps."""


def wait_awake() -> None:
    """Let the threads of libgomp, which torch uses on Linux, look for work for a moment before they sleep.

    As a rule they sleep at once where there are more of them than cores, though one thread's pool idles while another
    computes; waking them costs as much as a small layer. Call it before torch is imported, for libgomp reads its
    variables once; what the user has set stays.
    """
    if sys.platform == "linux":
        os.environ.setdefault("OMP_WAIT_POLICY", "active")
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
