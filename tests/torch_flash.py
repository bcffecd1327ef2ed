"""What stands in for a GPU's flash attention and CUDA graphs on a CPU, so that the steps that use them can run there.

The three functions compute in torch what flash-attn documents for those of their names; transformers calls them as it
would call those. A "graph" calls what would have been captured again, with the very same arguments: whatever is not
written in place shows as a wrong answer.
"""

from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils
from transformers.generation.continuous_batching import initialization, model_runner
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltaserve.server.engine import flash

NAME = "torch_flash_attention_2"


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    """``q`` ``[sequences, tokens, heads, width]``."""
    assert causal
    return torch.stack([_attend(*one, softmax_scale) for one in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """``q`` ``[tokens, heads, width]`` of sequences one after the other; the last query of one sees all of its keys."""
    assert causal
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    assert int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    out = torch.zeros_like(q)
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(queries) - 1):
        if queries[i] < queries[i + 1]:
            own, its = slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1])
            out[own] = _attend(q[own], k[its], v[its], softmax_scale)
    return out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """``q`` ``[sequences, 1, heads, width]``; its key goes behind the ``cache_seqlens`` of its pages, in place."""
    out, size = torch.zeros_like(q), k_cache.shape[1]
    for i, length in enumerate(cache_seqlens.tolist()):
        if length >= 0:  # else the sequence is padding
            pages = block_table[i, : length // size + 1].long()
            k_cache[pages[-1], length % size], v_cache[pages[-1], length % size] = k[i, 0], v[i, 0]
            keys, values = (cache[pages].flatten(0, 1)[: length + 1] for cache in (k_cache, v_cache))
            out[i] = _attend(q[i], keys, values, softmax_scale)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    heads = (x.transpose(0, 1) for x in (q, k, v))
    return scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=True).transpose(0, 1)


class Recorded:
    """Stands for a CUDA graph: what objects of ours say at a replay is not looked at, nor changed by it."""

    def __init__(self, runner: Any, forward: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._run = partial(forward.__func__, copy(runner), *args)  # type: ignore[attr-defined]
        self._rows = {id(one.rows): one.rows for one in args[0].modules() if hasattr(one, "rows")}.values()
        self._said = self._said_now()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        now = self._said_now()
        self._say(self._said)
        self._run()
        self._say(now)

    def reset(self) -> None:
        """Nothing is held."""

    def _said_now(self) -> list[tuple[Any, Any]]:
        return [(rows.segments, rows.places) for rows in self._rows]

    def _say(self, said: list[tuple[Any, Any]]) -> None:
        for rows, (segments, places) in zip(self._rows, said, strict=True):
            rows.segments, rows.places = segments, places


def _record(runner: Any, forward: Callable[..., None], stream: Any, *args: Any) -> None:
    forward(*args)  # the library's warm-up, whose result counts
    runner.inputs_and_outputs.set_graph(Recorded(runner, forward, args))


def register(patch: pytest.MonkeyPatch, flash_attn_func: Callable[..., Tensor] = flash_attn_func) -> None:
    """Let transformers find this attention under its name."""
    functions = (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, None, None)
    patch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *args, **kwargs: functions)
    patch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    ALL_ATTENTION_FUNCTIONS.register(NAME, flash_attention_forward)


def install(patch: pytest.MonkeyPatch) -> None:
    """Let engines that start from now on have this attention, and graphs."""
    register(patch)
    patch.setattr(flash, "implementation", lambda model: NAME)
    patch.setattr(flash, "PAGE_TOKENS", 16)
    for check in ("ensure_decode_fast_path_is_available", "decide_use_cuda_graphs"):  # there is no GPU
        patch.setattr(initialization, check, lambda *args, **kwargs: None)
    patch.setattr(model_runner, "get_memory_pools", lambda: (None, None))
    patch.setattr(model_runner, "memory_pool_context", nullcontext)
    patch.setattr(model_runner.ModelRunner, "_capture_graph", _record)
