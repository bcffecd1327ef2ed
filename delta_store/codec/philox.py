"""Philox4x32-10: random words as a pure function of a key and a counter, the same on every machine.

J. Salmon, M. Moraes, R. Dror, D. Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW_WORD = 0xFFFFFFFF

Key = tuple[int, int]


def key_for(seed: int, name: str) -> Key:
    """One tensor's key: the first 8 bytes of SHA-256 over the seed (8 bytes, little-endian) and the name."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + name.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox(counters: NDArray[np.uint32], key: Key) -> NDArray[np.uint32]:
    """Four random words for each counter: uint32 ``[..., 4]`` from uint32 ``[..., 4]``."""
    a, b, c, d = (counters[..., i].astype(np.uint64) for i in range(4))
    for i in range(ROUNDS):
        first, second = (np.uint64((word + i * step) & LOW_WORD) for word, step in zip(key, KEY_STEPS, strict=True))
        left, right = a * np.uint64(MULTIPLIERS[0]), c * np.uint64(MULTIPLIERS[1])
        a, c = _high(right) ^ b ^ first, _high(left) ^ d ^ second
        b, d = _low(right), _low(left)
    return np.stack([a, b, c, d], axis=-1).astype(np.uint32)


def _high(product: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return product >> np.uint64(32)


def _low(product: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return product & np.uint64(LOW_WORD)
