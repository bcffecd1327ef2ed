"""Which share of a base, and of a variant's deltas, a process holds: as transformers' plan for the family says.

A layer whose outputs are shared out (``colwise``: query, key, value, gate, up) has some rows of its weight; one whose
inputs are (``rowwise``: output, down) has some columns, and the processes' results are added up. All else is whole
everywhere: embeddings, norms, and the head, which process 0 alone computes.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaserve.delta_store.errors import OptionError, UnsupportedCheckpoint
from deltaserve.kernels import shards
from deltaserve.kernels.parts import Delta

ROWS, COLUMNS = "colwise", "rowwise"
WHOLE = "replicated_with_grad_allreduce"
"""For norms of single heads: the same vector whatever heads there are."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """The share of process ``rank`` of ``size``. ``plan``: style by module, ``*`` for a layer's number."""

    rank: int
    size: int
    plan: Mapping[str, str]

    @classmethod
    def of(cls, config: Any, size: int, rank: int = 0) -> "Sharding":
        """For a base with this (text) configuration. Raises OptionError where it cannot be shared out so."""
        plan = getattr(config, "base_model_tp_plan", None) or {}
        if not plan:
            raise OptionError(
                f"tensor_parallel is {size}, but transformers has no plan for sharing out {config.model_type} models; "
                "use 1"
            )
        if others := sorted(set(plan.values()) - {ROWS, COLUMNS, WHOLE}):
            raise OptionError(
                f"tensor_parallel is {size}, but {config.model_type} models share out layers as {', '.join(others)}, "
                "which is not supported; use 1"
            )
        heads = config.num_attention_heads
        counts = {
            "attention heads": heads,
            "key-value heads": getattr(config, "num_key_value_heads", None) or heads,
            "intermediate units": config.intermediate_size,
        }
        common = gcd(*counts.values())
        if common % size:
            has = ", ".join(f"{count} {name}" for name, count in counts.items())
            fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise OptionError(f"tensor_parallel is {size}, which must divide each of: {has}; it can be {fitting}")
        return cls(rank, size, plan)

    def whole_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a whole parameter, from that of a share."""
        axis = self._axis(name, len(shape))
        return tuple(n * self.size if i == axis else n for i, n in enumerate(shape))

    def cut(self, name: str, delta: Delta) -> Delta | None:
        """This process's share of a parameter's delta, None where there is none."""
        axis = self._axis(name, len(delta.shape))
        if axis is None:
            return None if self.rank and self._is_added_once(name) else delta
        return (shards.columns if axis else shards.rows)(delta, *self._bounds(delta.shape[axis]))

    @torch.no_grad()
    def narrow(self, model: PreTrainedModel, add_up: Callable[[Tensor], Tensor]) -> None:
        """Leave ``model`` its share of each layer, and its configuration the heads that it still has.

        ``add_up`` is called with the product of each layer whose inputs are shared out. Raises UnsupportedCheckpoint.
        """
        for name, module in model.named_modules():
            style = self._style(name)
            if style not in (ROWS, COLUMNS):
                continue
            if type(module) is not nn.Linear or module.weight.shape[style == COLUMNS] % self.size:
                raise UnsupportedCheckpoint(f"{name} ({type(module).__name__}) cannot be shared out: {module}")
            module.weight = self._share(module.weight, int(style == COLUMNS))
            module.out_features, module.in_features = module.weight.shape
            if style == COLUMNS:
                module.register_forward_hook(lambda module, args, y: add_up(y))
            if module.bias is not None and style == ROWS:
                module.bias = self._share(module.bias, 0)
            elif module.bias is not None and self.rank:
                module.bias = nn.Parameter(torch.zeros_like(module.bias), requires_grad=False)
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        config.num_key_value_heads = (getattr(config, "num_key_value_heads", None) or heads) // self.size
        config.num_attention_heads = heads // self.size
        config.intermediate_size //= self.size

    def _style(self, module: str) -> str | None:
        name = re.sub(r"\.\d+\.", ".*.", module)
        return next((style for pattern, style in self.plan.items() if name.endswith(f".{pattern}")), None)

    def _axis(self, parameter: str, dimensions: int) -> int | None:
        """Along which dimension a parameter is shared out, None where it is whole."""
        style = self._style(parameter.rpartition(".")[0])
        if style == ROWS:
            return 0
        return 1 if style == COLUMNS and dimensions == 2 else None

    def _is_added_once(self, parameter: str) -> bool:
        """Biases of results that are added up: those of process 0 are all there is."""
        return self._style(parameter.rpartition(".")[0]) == COLUMNS

    def _bounds(self, length: int) -> tuple[int, int]:
        each = length // self.size
        return self.rank * each, (self.rank + 1) * each

    def _share(self, whole: Tensor, axis: int) -> nn.Parameter:
        start, stop = self._bounds(whole.shape[axis])
        share = whole.narrow(axis, start, stop - start).clone(memory_format=torch.contiguous_format)
        return nn.Parameter(share, requires_grad=False)
