"""The paged cache of keys and values: prefixes are shared within a version only, and pages are read in place."""

# The library has no types that mypy could look at.
# mypy: disallow-subclassing-any=False

import hashlib
from contextvars import ContextVar
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching import continuous_api as api
from transformers.generation.continuous_batching.cache_allocators import cache_allocator

from deltaserve.kernels.cpu.operations import CpuBackend
from deltaserve.server.engine.continuous_batching.router import Router
from deltaserve.server.engine.continuous_batching.turns import owner_of
from deltaserve.server.engine.paging import Paged, Stored

EVICTIONS = 8
"""Under pressure, so many parts of all pages go at a time; the library wants 15 % of them free."""

_salt: ContextVar[int | None] = ContextVar("salt", default=None)
_unsalted_block_hash = cache_allocator.compute_block_hash


def salted_block_hash(parent: int | None, tokens: list[int]) -> int:
    """The library's hash of a page, where the first page of a variant's prompt has a salt for its parent."""
    return _unsalted_block_hash(_salt.get() if parent is None else parent, tokens)


def salt_of(request_id: str) -> int | None:
    """64 bits of the version's digest, None for the base."""
    digest = owner_of(request_id)
    return int.from_bytes(hashlib.blake2b(digest.encode(), digest_size=8).digest(), "little") if digest else None


class SaltedCache(api.PagedAttentionCache):
    """A paged cache whose prefixes are shared only between requests of one version."""

    router: Router
    reader: CpuBackend | None = None
    """Who reads the pages in place; without one, each layer copies the keys of the whole batch together."""

    @classmethod
    def of(cls, model: Any, config: Any, helper: Any) -> "SaltedCache":
        """The cache of a model, with the library's configuration of it."""
        return cls(
            config=model.config.get_text_config(),
            continuous_batching_config=config,
            device=model.device,
            distributed_helper=helper,
            dtype=model.dtype,
            model_supports_logits_to_keep=model._supports_logits_to_keep(),
        )

    def pages_of(self, batch: list[Any]) -> Paged:
        """Where the requests of this batch find their keys."""
        assert self.reader is not None
        allocator = self.cache_allocators["full_attention"]
        stride, tables = allocator.block_physical_stride, allocator.block_table
        return Paged(
            self.reader,
            self.stored,
            [torch.tensor(tables[f.state.request_id]) * stride for f in batch],
            [f.query_length for f in batch],
            [f.state.position_offset for f in batch],
            allocator.tokens_per_page,
        )

    @cached_property
    def stored(self) -> Stored:
        views = self.cache_allocators["full_attention"]._kv_token_views
        return [views[layer] for layer in sorted(views)]

    def extend_read_and_write_indices(
        self, request_id: str, past_length: int, query_length: int, read_index: Any, write_index: Any
    ) -> None:
        reads = read_index if self.reader is None else None
        super().extend_read_and_write_indices(request_id, past_length, query_length, reads, write_index)

    def update(self, key: Tensor, value: Tensor, layer: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Store the new keys and values; what is in the cache already stays there."""
        if "paged" not in kwargs:
            return super().update(key, value, layer, kwargs)
        kwargs["stored"] = self.stored[layer]
        for cache, new in zip(kwargs["stored"], (key, value), strict=True):
            cache.index_copy_(0, kwargs["write_index"][0], new[0].transpose(0, 1))
        return key, value

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        _salt.set(salt_of(request_id))
        found = int(super().search_prefix_match(request_id, prompt_ids))
        job = self.router.jobs[request_id]
        if not job.chooser.generated:  # else it was displaced and reads its own pages again
            job.cached_tokens = found
        return found

    def mark_complete_blocks(self, state: api.RequestState, complete_blocks: dict[str, int]) -> None:
        _salt.set(salt_of(state.request_id))
        super().mark_complete_blocks(state, complete_blocks)

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        """A request's last pages first: the end of a prefix is forgotten before what it hangs on."""
        for allocator in self.cache_allocators.values():
            allocator.block_table.get(request_id, []).reverse()
        super().free_blocks(request_id, no_cache)

    def evict_cached_blocks(self) -> bool:
        """Forget some of the pages that no request needs, the longest unused first; the library forgets all at once."""
        evicted = False
        for allocator in self.cache_allocators.values():
            ledger = allocator.ledger
            oldest = list(islice(ledger.cached_blocks, -(-allocator.num_blocks // EVICTIONS)))
            for page in oldest:
                del ledger.cached_blocks[page]
                del ledger.hash_to_block[ledger.block_to_hash.pop(page)]
            self.pool.free_blocks(allocator.index, oldest)
            evicted = evicted or bool(oldest)
        return evicted


cache_allocator.compute_block_hash = salted_block_hash
