"""Attention over a flat batch of requests of different lengths, without a mask over all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltaserve.server.engine.paging import Paged

NAME = "deltaserve"

GROWTH, SLACK = 1.5, 32
"""Decoding requests share a call while the longest has at most GROWTH x the keys of the shortest, plus SLACK: a call
costs as much as some dozens of padded keys."""


@dataclass(frozen=True, slots=True, eq=False)
class Decodes:
    """Requests with one query each, at ``rows`` int64 ``[n]``; from key row ``start`` on, ``keys`` rows for each.

    ``mask`` bool ``[n, 1, 1, keys]`` is False on padding, None where there is none.
    """

    rows: Tensor
    start: int
    keys: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """One request with several queries, the last of which sees all keys; ``mask`` bool ``[queries, keys]``."""

    queries: slice
    keys: slice
    mask: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Where each request's queries and keys are in the flat batch of one step.

    ``reads`` int64 maps key rows of this layout to those of the requests' own, one after the other; -1 is padding.
    """

    decodes: tuple[Decodes, ...]
    prefills: tuple[Prefill, ...]
    reads: Tensor

    @classmethod
    def of(cls, query_lengths: Sequence[int], key_lengths: Sequence[int], *, gathered: bool = True) -> "Spans":
        """Lay out requests of these lengths, in flat order; each request's queries are the last of its keys.

        ``gathered`` False: ``reads`` will not be heeded, since all keys are new; then they stay in flat order.
        """
        queries, keys = _offsets(query_lengths), _offsets(key_lengths)
        singles = [i for i, length in enumerate(query_lengths) if length == 1 and gathered]
        decodes, reads, start = [], [], 0
        for group in _similar(singles, key_lengths):
            decodes.append(_decodes(group, queries, key_lengths, start))
            for i in group:
                padding = [-1] * (decodes[-1].keys - key_lengths[i])
                reads.append(torch.cat([torch.arange(keys[i], keys[i + 1]), torch.tensor(padding, dtype=torch.int64)]))
            start += decodes[-1].keys * len(group)
        prefills = []
        for i, length in enumerate(query_lengths):
            if length > 1 or not gathered:
                prefills.append(_prefill(queries[i], length, start, key_lengths[i]))
                reads.append(torch.arange(keys[i], keys[i + 1]))
                start += key_lengths[i]
        return cls(tuple(decodes), tuple(prefills), torch.cat(reads))

    def gather(self, index: Tensor, padding: int) -> Tensor:
        """Where in the cache the key rows of this layout are, from where the requests' own are (``index``)."""
        reads = self.reads.to(index.device)
        return torch.where(reads < 0, padding, index[reads])

    def to(self, device: torch.device) -> "Spans":
        """The same, with its tensors there."""
        if device.type == "cpu":
            return self
        decodes = tuple(replace(d, rows=d.rows.to(device), mask=_to(d.mask, device)) for d in self.decodes)
        prefills = tuple(replace(p, mask=_to(p.mask, device)) for p in self.prefills)
        return Spans(decodes, prefills, self.reads.to(device))


def _to(mask: Tensor | None, device: torch.device) -> Tensor | None:
    return None if mask is None else mask.to(device)


def _offsets(lengths: Sequence[int]) -> list[int]:
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return offsets


def _similar(requests: list[int], key_lengths: Sequence[int]) -> list[list[int]]:
    """Groups of requests with similar numbers of keys."""
    groups: list[list[int]] = []
    for i in sorted(requests, key=lambda i: key_lengths[i]):
        if groups and key_lengths[i] <= GROWTH * key_lengths[groups[-1][0]] + SLACK:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _decodes(group: list[int], queries: list[int], key_lengths: Sequence[int], start: int) -> Decodes:
    lengths = torch.tensor([key_lengths[i] for i in group])
    longest = int(lengths.max())
    mask = (
        None
        if int(lengths.min()) == longest
        else torch.arange(longest)[None, None, None] < lengths[:, None, None, None]
    )
    return Decodes(torch.tensor([queries[i] for i in group]), start, longest, mask)


def _prefill(query: int, queries: int, key: int, keys: int) -> Prefill:
    mask = None if queries == keys else torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return Prefill(slice(query, query + queries), slice(key, key + keys), mask)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    spans: Spans | None = None,
    paged: Paged | None = None,
    stored: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers' models call it; without ``spans`` or ``paged`` it is transformers' sdpa.

    ``query`` ``[1, heads, queries, width]``, ``key`` and ``value`` ``[1, key heads, keys, width]`` laid out as
    ``spans`` says; with ``paged`` the queries' own, and ``stored`` is the layer's cache. Returns
    ``[1, queries, heads, width]``.
    """
    if paged is not None and stored is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return paged.attend(query, key, value, stored, scale)[None], None
    if spans is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return plain
    heads, key_heads = query.shape[1], key.shape[1]
    out = query.new_empty(query.shape[2], heads, value.shape[3])
    for group in spans.decodes:
        n = len(group.rows)
        taken = slice(group.start, group.start + n * group.keys)
        k = key[0, :, taken].view(key_heads, n, group.keys, -1).transpose(0, 1)
        v = value[0, :, taken].view(key_heads, n, group.keys, -1).transpose(0, 1)
        # The query heads that share a key head become the rows of one product: keys are read once, not once a head.
        packed = query[0, :, group.rows].transpose(0, 1).reshape(n, key_heads, heads // key_heads, -1)
        result = scaled_dot_product_attention(packed, k, v, attn_mask=group.mask, scale=scaling)
        out[group.rows] = result.reshape(n, heads, -1)
    for prefill in spans.prefills:
        result = scaled_dot_product_attention(
            query[:, :, prefill.queries],
            key[:, :, prefill.keys],
            value[:, :, prefill.keys],
            attn_mask=prefill.mask,
            is_causal=prefill.mask is None,
            scale=scaling,
            enable_gqa=heads != key_heads,
        )
        out[prefill.queries] = result[0].transpose(0, 1)
    return out[None], None


def unsupported(config: Any) -> str | None:
    """What a model's configuration asks of its attention that ``attend`` does not do, in words; None if nothing."""
    windowed = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or (windowed and getattr(config, "layer_types", None) is None):
        return f"attention over a window ({', '.join(sorted(kinds)) or f'sliding_window = {config.sliding_window}'})"
    for name in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(config, name, None):
            return f"{name} = {getattr(config, name)}"
    return None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
# Outside continuous batching the model makes the masks that sdpa expects; inside it makes none.
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
