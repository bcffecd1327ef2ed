"""Linear layers with what each variant adds to them, for backends that leave the base's product to torch."""

from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from deltaserve.kernels.segments import Segments
from deltaserve.kernels.weights import Weight

Bank = MutableSequence[Any]
"""One layer's prepared deltas by slot, None where a variant leaves the layer as it is."""


@dataclass(frozen=True, slots=True, eq=False)
class Layers:
    """Layers that read the same input. ``biases[layer][slot]`` is float32 ``[out]`` or None."""

    weights: Sequence[Weight]
    banks: Sequence[Bank]
    biases: list[dict[int, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "biases", [{} for _ in self.weights])

    def install(self, layer: int, slot: int, prepared: Any | None) -> None:
        self.banks[layer][slot] = prepared

    def install_bias(self, layer: int, slot: int, bias: Tensor | None) -> None:
        if bias is None:
            self.biases[layer].pop(slot, None)
        else:
            self.biases[layer][slot] = bias

    def bias_delta(self, layer: int, slot: int) -> Tensor | None:
        """What ``install_bias`` put there."""
        return self.biases[layer].get(slot)

    def product(self, layer: int, x: Tensor) -> Tensor:
        """The base's ``x @ weight.T + bias`` in the dtype of ``x``."""
        weight = self.weights[layer]
        return linear(x, weight.dense().to(x.dtype), None if weight.bias is None else weight.bias.to(x.dtype))

    def add(
        self, layer: int, y: Tensor, x: Tensor, segments: Segments | None, delta_linear_: Callable[..., None]
    ) -> None:
        """Deltas and bias deltas of the batch's variants, in place."""
        if segments is None:
            return
        delta_linear_(y, x, self.banks[layer], segments)
        for slot in segments.rows.keys() & self.biases[layer].keys():
            bias, rows = self.biases[layer][slot], segments.rows[slot]
            y[rows, : len(bias)] = (y[rows, : len(bias)].float() + bias).to(y.dtype)
