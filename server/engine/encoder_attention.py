"""Attention in both directions over a flat batch of texts of different lengths, without a mask over all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "deltaserve-encoder"

GROWTH, SLACK = 1.25, 8
"""Texts share a call while the longest has at most GROWTH x the tokens of the shortest, plus SLACK."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Texts of similar lengths: ``rows`` int64 ``[texts, longest]`` of the flat batch, padded with a text's first one.

    ``mask`` bool ``[texts, 1, 1, longest]`` is False on padding and ``kept`` bool ``[texts, longest]`` too; both are
    None where there is none.
    """

    texts: tuple[int, ...]
    rows: Tensor
    mask: Tensor | None
    kept: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Where the texts of a flat batch are, those of similar lengths together."""

    groups: tuple[Group, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Texts":
        """Texts of these lengths, one after the other."""
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        return cls(tuple(_group(texts, starts, lengths) for texts in similar(lengths)))


def similar(lengths: Sequence[int]) -> list[list[int]]:
    """The indices of texts in groups of similar lengths."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and lengths[i] <= GROWTH * lengths[groups[-1][0]] + SLACK:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _group(texts: list[int], starts: Tensor, lengths: Sequence[int]) -> Group:
    own = torch.tensor([lengths[i] for i in texts])[:, None]
    steps = torch.arange(int(own.max()))[None]
    kept = steps < own
    rows = starts[texts, None] + torch.where(kept, steps, 0)
    if bool(kept.all()):
        return Group(tuple(texts), rows, None, None)
    return Group(tuple(texts), rows, kept[:, None, None], kept)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    texts: Texts | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers' models call it; without ``texts`` it is transformers' sdpa.

    ``query``, ``key`` and ``value`` are ``[1, heads, rows, width]``. Returns ``[1, rows, heads, width]``.
    """
    if texts is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return plain
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = query.new_empty(len(q), q.shape[1], v.shape[2])
    for group in texts.groups:
        queries, keys, values = (tensor[group.rows].transpose(1, 2) for tensor in (q, k, v))
        result = scaled_dot_product_attention(queries, keys, values, attn_mask=group.mask, scale=scaling).transpose(
            1, 2
        )
        if group.kept is None:
            out[group.rows] = result
        else:
            out[group.rows[group.kept]] = result[group.kept]
    return out[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
# A padded batch has the mask that sdpa expects; a flat one has none.
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
