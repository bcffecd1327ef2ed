"""Columns of sparse parts, in C++: seeded draws (as in ``delta_store/codec/masks.py``), and how kernels keep them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltaserve.kernels.cpu.library import library

CHUNK = 16
WIDEST_COLUMN = 1 << 16

Key = tuple[int, int]


def uniform_columns(key: Key, blocks: int, width: int, kept: int) -> Tensor:
    """int32 ``[blocks, kept]``; ``1 <= kept <= width``."""
    columns = torch.empty(blocks, kept, dtype=torch.int32)
    if library().deltaserve_uniform_columns(*key, blocks, width, kept, columns.data_ptr()):
        raise MemoryError("No memory to draw a mask")
    return columns


def weighted_columns(weights: Tensor, key: Key, blocks: int, kept: int) -> tuple[Tensor, Tensor]:
    """Columns int32 ``[blocks, kept]`` and factors float32 ``[width]``; ``weights`` int64 ``[width]``.

    Raises ValueError for a weight below 1, or weights too large for 64-bit arithmetic.
    """
    weights, width = weights.contiguous(), len(weights)
    columns, factors = torch.empty(blocks, kept, dtype=torch.int32), torch.empty(width)
    arguments = (weights.data_ptr(), *key, blocks, width, kept, columns.data_ptr(), factors.data_ptr())
    if library().deltaserve_weighted_columns(*arguments):
        raise ValueError("These weights cannot be drawn from")
    return columns, factors


def laid_out(columns: Tensor, width: int) -> NDArray[Any]:
    """Columns ``[blocks, kept]`` as kernels read them: 16 bits wide where that is enough, and ``CHUNK`` zeros behind.

    Raises ValueError for columns out of range or out of order.
    """
    columns = columns.int().contiguous()
    blocks, kept = columns.shape
    copy = np.zeros(blocks * kept + CHUNK, np.int32 if width > WIDEST_COLUMN else np.uint16)
    if library().deltaserve_keep_columns(columns.data_ptr(), blocks, width, kept, copy.ctypes.data):
        raise ValueError(f"Columns of a sparse part must ascend within each block, and lie within 0 .. {width - 1}")
    return copy
