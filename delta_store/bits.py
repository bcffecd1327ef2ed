"""Equality of two tensors as a lossless store understands it."""

import torch
from torch import Tensor


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal: bit for bit in one dtype, by float32 values where dtypes differ."""
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        # A scalar cannot be viewed as bytes.
        return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    return torch.equal(one.float(), other.float())
