"""Linear layers that read the same input, prepared for one call: pointers are taken once, none while serving."""

from array import array
from collections.abc import Sequence
from ctypes import Array
from typing import Any

import torch
from torch import Tensor

from deltaserve.kernels.cpu.layout import Prepared
from deltaserve.kernels.cpu.products import Choice
from deltaserve.kernels.cpu.structs import CODECS, LayerStruct
from deltaserve.kernels.weights import Weight

WEIGHT_CODECS = {torch.float32: "float32", torch.bfloat16: "bf16", torch.int8: "int8"}


class Slots(Sequence[Any]):
    """What each variant adds to one layer, by slot, with pointers at hand: ``Prepared`` deltas, or float32 biases.

    A plain list serves as well, some microseconds slower at every call.
    """

    def __init__(self, held: Sequence[Prepared | Tensor | None]) -> None:
        self.held = list(held)
        self._pointers = array("Q", map(_address, self.held))
        self.address = self._pointers.buffer_info()[0]
        self.layers = (LayerStruct * 1)(LayerStruct(deltas=self.address, slots=len(self.held)))

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, slot: Any) -> Any:
        return self.held[slot]

    def __setitem__(self, slot: int, one: Prepared | Tensor | None) -> None:
        self._pointers[slot] = _address(one)
        self.held[slot] = one


def _address(one: Prepared | Tensor | None) -> int:
    return 0 if one is None else one.address if isinstance(one, Prepared) else one.data_ptr()


def _bias_of(weight: Weight) -> Tensor | None:
    """As ``Layer`` of delta.h has it."""
    if weight.bias is None:
        return None
    bias = weight.bias.float().contiguous()
    return bias if weight.scales is None else bias / weight.scales


class Layers:
    """``weights``, each with a bank of ``slots`` deltas and of biases (float32 ``[out]``).

    ``whole`` are the structs for the kernel's own product, None where it cannot read such weights; ``deltas`` are those
    that only add to a ``y`` which holds the base's product. ``products`` says which serves how many rows.
    """

    def __init__(self, weights: Sequence[Weight], slots: int, products: Choice) -> None:
        self.weights, self.products = tuple(weights), products
        self.out, self.width = tuple(len(weight.values) for weight in weights), weights[0].values.shape[1]
        self.banks = tuple(Slots([None] * slots) for _ in weights)
        self.biases = tuple(Slots([None] * slots) for _ in weights)
        self.tables = (*self.banks, *self.biases)
        self._kept = [_bias_of(weight) for weight in weights]
        own = all(weight.values.dtype in WEIGHT_CODECS and weight.values.is_contiguous() for weight in weights)
        self.whole = self._structs(with_weights=True) if own else None
        self.deltas = self._structs(with_weights=False)

    def install(self, layer: int, slot: int, prepared: Prepared | None) -> None:
        self.banks[layer][slot] = prepared

    def install_bias(self, layer: int, slot: int, bias: Tensor | None) -> None:
        """``bias`` is contiguous float32 ``[out]``."""
        biases = self.biases[layer]
        biases[slot] = bias
        address = biases.address if any(one is not None for one in biases.held) else None
        for structs in (self.whole, self.deltas):
            if structs is not None:
                structs[layer].biases = address

    def bias_delta(self, layer: int, slot: int) -> Tensor | None:
        """What ``install_bias`` put there."""
        bias: Tensor | None = self.biases[layer][slot]
        return bias

    def _structs(self, *, with_weights: bool) -> Array[LayerStruct]:
        structs = (LayerStruct * len(self.weights))()
        for struct, weight, bias, bank in zip(structs, self.weights, self._kept, self.banks, strict=True):
            struct.deltas, struct.slots = bank.address, len(bank)
            struct.rows, struct.width = weight.values.shape
            if with_weights:
                struct.weight = weight.values.data_ptr()
                struct.scales = None if weight.scales is None else weight.scales.data_ptr()
                struct.bias = None if bias is None else bias.data_ptr()
                struct.codec = CODECS.index(WEIGHT_CODECS[weight.values.dtype])
        return structs
