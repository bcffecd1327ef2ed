"""Where the deltas of one variant lie: in mapped pages, which go back to the system with the variant.

The heap would keep much of them: of hundreds of variants that come and go, each with hundreds of layers, some object is
always left above a hole. Pages that nothing was written to take no memory. What layers have in common with those of
other variants (columns of one seed, factors of one profile) is there once.
"""

import ctypes
import hashlib
import mmap
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

CHUNK_BYTES = 1 << 20
ALIGNMENT = 8


class Pages:
    """Zeros, at ``address``, as long as this object lives."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, max(nbytes, 1), **PRIVATE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))


PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}

_COLUMNS: WeakValueDictionary[bytes, Pages] = WeakValueDictionary()
_FACTORS: WeakValueDictionary[bytes, NDArray[np.float32]] = WeakValueDictionary()


class Memory:
    """Grows by chunks of ``chunk`` bytes, or whatever one request needs. ``settle`` is called once, when all is in it.

    ``nbytes``: what was put into it, columns included, factors not.
    """

    def __init__(self, chunk: int = CHUNK_BYTES) -> None:
        self.nbytes = 0
        self._chunk, self._next, self._end = chunk, 0, 0
        self._pages: list[Pages] = []
        self._factors: list[NDArray[np.float32]] = []
        self._columns: list[tuple[int, NDArray[Any]]] = []

    def take(self, nbytes: int) -> int:
        """The address of so many zeros."""
        nbytes = _aligned(nbytes)
        self.nbytes += nbytes
        if nbytes > self._chunk // 2:
            self._pages.append(Pages(nbytes))
            return self._pages[-1].address
        if self._next + nbytes > self._end:
            self._pages.append(Pages(self._chunk))
            self._next = self._pages[-1].address
            self._end = self._next + self._chunk
        address, self._next = self._next, self._next + nbytes
        return address

    def copy(self, tensor: Tensor) -> int:
        """The address of a copy of a contiguous tensor."""
        address = self.take(tensor.nbytes)
        ctypes.memmove(address, tensor.data_ptr(), tensor.nbytes)
        return address

    def share(self, factors: NDArray[np.float32]) -> int:
        """The address of a copy of these factors that may serve other deltas as well."""
        key = _key(factors)
        if (copy := _FACTORS.get(key)) is None:
            copy = _FACTORS.setdefault(key, factors.copy())
        self._factors.append(copy)
        return copy.ctypes.data

    def columns(self, pointer: int, columns: NDArray[Any]) -> None:
        """Have the pointer that stands at ``pointer`` lead to these columns, once everything is settled."""
        self._columns.append((pointer, columns))
        self.nbytes += _aligned(columns.nbytes)

    def settle(self) -> None:
        """Lay all columns together: variants that were pruned with one seed have all of them in common."""
        if not self._columns:
            return
        offset, places = 0, []
        for pointer, columns in self._columns:
            places.append((pointer, offset))
            offset += _aligned(columns.nbytes)
        together = np.zeros(offset, np.uint8)
        for (_, at), (_, columns) in zip(places, self._columns, strict=True):
            together[at : at + columns.nbytes] = columns.view(np.uint8)
        key = _key(together)
        if (pages := _COLUMNS.get(key)) is None:
            pages = Pages(together.nbytes)
            ctypes.memmove(pages.address, together.ctypes.data, together.nbytes)
            pages = _COLUMNS.setdefault(key, pages)
        self._pages.append(pages)
        self._columns.clear()
        for pointer, at in places:
            ctypes.c_void_p.from_address(pointer).value = pages.address + at


def _key(values: NDArray[Any]) -> bytes:
    return hashlib.blake2b(values.data, digest_size=16).digest()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
