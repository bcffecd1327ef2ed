"""Decoder layers that one call of a kernel computes, where a step has few rows: all of them, for all variants.

They are known by what they compute: layers with the parts of Llama's, whose own forward gives what the kernel gives.
Other models, and steps with many rows, run layer by layer.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltaserve.kernels.cpu.operations import CpuBackend
from deltaserve.kernels.decoder import Block, Heads, Norm, Step
from deltaserve.kernels.dispatch import Backend
from deltaserve.kernels.paged import Pages
from deltaserve.server.engine.layers import DeltaLinear
from deltaserve.server.engine.norms import DeltaNorm
from deltaserve.server.engine.paging import Paged
from deltaserve.server.engine.routing import Rows

PROBE = 3
"""Tokens of the comparison: with fewer, neither positions nor earlier keys would count."""


class Stack:
    """The decoder layers of a model, in their order; ``rows`` are those of their parts."""

    def __init__(self, decoder: Any, width: int, rows: Rows) -> None:
        self._decoder, self._width, self._rows = decoder, width, rows

    def takes(self, x: Tensor, step: dict[str, Any]) -> bool:
        """Whether the layers, called with these arguments, are computed at once."""
        paged: Paged | None = step.get("paged")
        if paged is None or not paged.is_row_by_row or x.dtype != torch.float32:
            return False
        return bool(step["position_embeddings"][0].shape[-1] == self._width)

    def run(self, x: Tensor, step: dict[str, Any]) -> Tensor:
        paged: Paged = step["paged"]
        rows, segments = self._rows, self._rows.segments
        cosines, sines = (turn.reshape(-1, self._width).contiguous() for turn in step["position_embeddings"])
        y = x[0].clone()
        self._decoder.run(
            y,
            Step(
                paged.cache,
                paged.rows,
                step["write_index"][0],
                cosines,
                sines,
                None if segments is None else rows.places,
                segments,  # type: ignore[arg-type]  # no table: these backends read segments
            ),
        )
        return y[None]


class DeltaBlock(nn.Module):
    """A decoder layer that is the ``place``-th of a stack: the first one computes for all, the others pass it on."""

    stack: Stack
    place: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.stack.takes(hidden_states, kwargs):
            return super().forward(hidden_states, *args, **kwargs)
        return self.stack.run(hidden_states, kwargs) if self.place == 0 else hidden_states


def stack(model: nn.Module, rows: Rows, backend: Backend) -> bool:
    """Stack the decoder layers of a model whose parts are twins; False where they are of another kind."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not isinstance(backend, CpuBackend) or len(lists) != 1:
        return False
    layers = list(lists[0])
    found = [one for one in map(_described, layers) if one is not None]
    if not found or len(found) < len(layers) or len({heads for _, heads in found}) > 1:
        return False
    blocks, heads = [block for block, _ in found], found[0][1]
    if not all(_computes(backend, layer, block, heads) for layer, block in zip(layers, blocks, strict=True)):
        return False
    whole = Stack(backend.decoder(blocks, heads), heads.width, rows)
    for place, layer in enumerate(layers):
        layer.__class__ = type(f"Delta{type(layer).__name__}", (DeltaBlock, type(layer)), {})
        twin = cast(DeltaBlock, layer)
        twin.stack, twin.place = whole, place
    return True


def _described(layer: nn.Module) -> tuple[Block, Heads] | None:
    """A layer with the parts of Llama's, and no others."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    norms = [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    groups = [
        [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")],
        [getattr(attention, "o_proj", None)],
        [getattr(mlp, name, None) for name in ("gate_proj", "up_proj")],
        [getattr(mlp, "down_proj", None)],
    ]
    if not all(isinstance(norm, DeltaNorm) and norm.formula for norm in norms) or not all(map(_are_siblings, groups)):
        return None
    parts = [*norms, *(part for group in groups for part in group)]
    if any(part._forward_hooks for part in parts):  # type: ignore[union-attr]  # more is computed than the layers say
        return None
    known = {id(parameter) for part in parts for parameter in part.parameters()}  # type: ignore[union-attr]
    width, scale = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    if {id(parameter) for parameter in layer.parameters()} != known or not isinstance(width, int) or width % 2:
        return None
    layers = [group[0].siblings.layers for group in groups]  # type: ignore[union-attr]
    heads = Heads(layers[0].out[0] // width, layers[0].out[1] // width, width, float(scale))  # type: ignore[arg-type]
    block = Block(_norm(norms[0]), layers[0], layers[1], _norm(norms[1]), layers[2], layers[3])
    return block, heads


def _are_siblings(group: Sequence[Any]) -> bool:
    """Whether these layers, in this order, are computed at once."""
    if not all(isinstance(layer, DeltaLinear) for layer in group):
        return False
    first = group[0].siblings
    in_order = all(layer.siblings is first and layer.member == i for i, layer in enumerate(group))
    return in_order and len(first.layers.out) == len(group)


def _norm(norm: Any) -> Norm:
    return Norm(norm.get_parameter("weight").detach(), norm.tables["weight"], *norm.formula)


@torch.no_grad()
def _computes(backend: CpuBackend, layer: nn.Module, block: Block, heads: Heads) -> bool:
    """Whether the layer's own forward over some tokens is what the kernel computes."""
    decoder = backend.decoder([block], heads)
    if decoder is None:
        return False
    rng = torch.Generator().manual_seed(0)
    x, turns = (torch.randn(n, PROBE, w, generator=rng) for n, w in ((1, block.down.out[0]), (2, heads.width)))
    try:
        own = layer(x, attention_mask=None, position_embeddings=(turns[:1], turns[1:]))
    except (TypeError, RuntimeError, ValueError):  # it wants other arguments
        return False
    keys, values = torch.zeros(2, PROBE, heads.keys, heads.width)
    pages = Pages(torch.tensor([0]), torch.zeros(PROBE, dtype=torch.int64), torch.arange(1, PROBE + 1), PROBE)
    y = x[0].clone()
    decoder.run(y, Step([(keys, values)], pages, torch.arange(PROBE), turns[0], turns[1], None, None))
    return isinstance(own, Tensor) and bool((own[0] - y).norm() <= 1e-4 * (own[0] - x[0]).norm())
