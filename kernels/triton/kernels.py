"""GPU kernels in Triton; without a GPU they run under Triton's interpreter (``TRITON_INTERPRET=1``)."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _add(target, addend, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    tl.store(target + at, tl.load(target + at, inside) + tl.load(addend + at, inside), inside)


def add_(target: Tensor, addend: Tensor) -> None:
    """``target += addend`` in place, for contiguous tensors of one shape: proves that this folder's build works."""
    if target.shape != addend.shape or not (target.is_contiguous() and addend.is_contiguous()):
        raise ValueError(
            f"add_ needs contiguous tensors of one shape, not {tuple(target.shape)} and {tuple(addend.shape)}"
        )
    _add[(triton.cdiv(target.numel(), 1024),)](target, addend.to(torch.float32), target.numel(), BLOCK=1024)
