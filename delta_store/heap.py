"""The C library's heap: give freed memory back to the system, so that memory follows what is in use.

glibc stops mapping large blocks one by one once some were freed, and takes them from one heap instead. A few kilobytes
that are kept for each tensor then hold on to all the megabytes freed below them: measured, 540 MB for a fine-tune of
420 MB whose encoded parts are 13 MB.
"""

import ctypes
import ctypes.util
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Where the C library can; elsewhere it does nothing."""
    if trim := _trim():
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
