"""The decoder blocks of Llama and its relatives: what one call of a kernel computes for the few rows of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltaserve.kernels.paged import Pages
from deltaserve.kernels.segments import Segments


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """``(weight + offset) * x / sqrt(mean(x**2) + epsilon)``; ``table`` ``[entries, n]``: the base's, each slot's."""

    weight: Tensor
    table: Tensor
    epsilon: float
    offset: float


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """``x += output(attention(input(norm(x))))``, then ``x += down(silu(gate) * up)`` of ``norm(x)``.

    ``input`` are the layers of query, key and value, ``gate_and_up`` two layers, ``output`` and ``down`` one each, as
    the backend's ``layers`` made them.
    """

    attention_norm: Norm
    input: Any
    output: Any
    mlp_norm: Norm
    gate_and_up: Any
    down: Any


@dataclass(frozen=True, slots=True)
class Heads:
    """``count`` query heads of ``width`` values, in equal consecutive groups for ``keys`` key heads."""

    count: int
    keys: int
    width: int
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What the rows of a step are. Their keys and values go to ``writes`` int64 ``[rows]``, and are read by ``pages``.

    ``cache`` has keys and values ``[token rows, key heads, width]`` of each block. ``cosines`` and ``sines``
    ``[rows, width]`` turn the halves of a head. ``places`` int64 ``[rows]`` is each row's entry in the tables of norms,
    None where ``weight`` is that of all; ``segments`` are those of the layers.
    """

    cache: Sequence[tuple[Tensor, Tensor]]
    pages: Pages
    writes: Tensor
    cosines: Tensor
    sines: Tensor
    places: Tensor | None
    segments: Segments | None
