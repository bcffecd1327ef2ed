"""Integers as compressed byte planes: the low byte of every number, then the next byte of every number, and so on.

Bytes of one plane are alike (the high bytes of small gaps are all zero), so zstd gets within 3 % of the entropy of kept
columns. The length before compression follows from the count, so a hostile frame cannot make the reader allocate more.
"""

from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from deltaserve.delta_store.errors import CorruptArtifact

SMALLEST, FAST = 19, 1
"""zstd levels: for a few bytes, and for whole weights, where level 9 is nine times slower and no smaller."""


def squeeze(numbers: NDArray[Any], level: int) -> bytes:
    """A zstd frame of the planes of unsigned integers, of any shape."""
    little = np.ascontiguousarray(numbers, numbers.dtype.newbyteorder("<"))
    planes = little.reshape(-1, 1).view(np.uint8).T
    return zstandard.ZstdCompressor(level=level).compress(planes.tobytes())


def expand(data: bytes, count: int, dtype: Any) -> NDArray[Any]:
    """The ``count`` integers of ``dtype`` that were squeezed. Raises CorruptArtifact where they were others."""
    dtype = np.dtype(dtype).newbyteorder("<")
    planes = np.frombuffer(_decompress(data, count * dtype.itemsize), np.uint8).reshape(dtype.itemsize, count)
    return np.ascontiguousarray(planes.T).reshape(-1).view(dtype)


def squeeze_ascending(rows: NDArray[Any]) -> bytes:
    """Rows of ascending numbers ``[rows, n]``: the first of each row, then the gaps less one."""
    gaps = np.diff(rows.astype(np.int64), axis=1, prepend=-1) - 1
    return squeeze(gaps.astype(np.uint32), SMALLEST)


def expand_ascending(data: bytes, rows: int, count: int, limit: int) -> NDArray[np.int64]:
    """int64 ``[rows, count]``, each row ascending from 0 and below ``limit``. Raises CorruptArtifact otherwise."""
    gaps = expand(data, rows * count, np.uint32).reshape(rows, count)
    numbers = np.cumsum(gaps.astype(np.int64) + 1, axis=1) - 1
    if numbers.size and numbers[:, -1].max() >= limit:
        raise CorruptArtifact(f"index {numbers[:, -1].max()} is out of range; the limit is {limit - 1}")
    return numbers


def _decompress(data: bytes, length: int) -> bytes:
    try:
        announced = zstandard.frame_content_size(data)
        if announced != length:
            raise CorruptArtifact(f"a compressed block announces {announced} bytes where there must be {length}")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptArtifact(f"a compressed block cannot be read ({error})") from error
