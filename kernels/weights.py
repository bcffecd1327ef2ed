"""The base's own weight of a linear layer, as kernels read it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """``values`` ``[out, in]``, contiguous: float32, bfloat16 or float16, or int8 with ``scales`` float32 ``[out]``,
    none of them zero.

    ``bias`` ``[out]`` or None. The tensors are the model's own, not copies: what is swapped into them counts.
    ``packed`` is a second copy of ``values`` in a library's layout, where one was asked for; a swap does not reach it.
    """

    values: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None
    packed: Tensor | None = None

    def dense(self) -> Tensor:
        """``[out, in]`` in a floating dtype."""
        return self.values if self.scales is None else self.values.float() * self.scales[:, None]


def quantised(values: Tensor, bias: Tensor | None = None) -> Weight:
    """Weight-only int8: each row's largest magnitude becomes 127; a row of zeros stays zeros."""
    largest = values.float().abs().amax(1)
    scales = torch.where(largest == 0, 1, largest / 127)
    return Weight((values.float() / scales[:, None]).round().to(torch.int8), scales, bias)
