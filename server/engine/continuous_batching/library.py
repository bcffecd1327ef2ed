"""Whether the batching library is the one that these classes were written for."""

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers.generation.continuous_batching import continuous_api as api
from transformers.generation.continuous_batching.cache_allocators import cache_allocator
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

_SIGNATURES: dict[Callable[..., Any], str] = {
    cache_allocator.compute_block_hash: "parent_hash tokens",
    api.PagedAttentionCache.extend_read_and_write_indices: (
        "self request_id past_length query_length read_index write_index"
    ),
    api.PagedAttentionCache.update: "self key_states value_states layer_idx kwargs",
    api.PagedAttentionCache.search_prefix_match: "self request_id prompt_ids",
    api.PagedAttentionCache.mark_complete_blocks: "self state complete_blocks",
    api.PagedAttentionCache.free_blocks: "self request_id no_cache",
    api.PagedAttentionCache.evict_cached_blocks: "self",
    api.OutputRouter.fail_and_deliver: "self state error",
    api.OutputRouter.deliver_batch: "self outputs",
    ModelRunner.compute_batch: "self model batch_data",
    ModelRunner._sample: "self scores output_ids",
    ModelRunner._get_forward_fn: "self use_block_table",
    ModelRunner._capture_graph: "self forward_fn compute_stream args",
    ContinuousBatchingIOs._get_num_sequences: "self use_padding",
    FIFOScheduler._get_waiting_candidates: "self",
    api.ContinuousBatchProcessor.prepare_next_batch: "self",
    api.ContinuousBatchProcessor._generation_step: "self model",
    api.ContinuousBatchProcessor.update_batch: "self",
    api.ContinuousBatchingManager.switch_to_cb_friendly_attn: "self model auto_switch_to_flash",
    api.ContinuousBatchingManager.add_request: (
        "self input_ids request_id max_new_tokens streaming record_timestamps eos_token_id logit_processor_kwargs"
    ),
    api.ContinuousBatchingManager._generation_step: "self",
    api.ContinuousBatchingManager._create_batch_processor: "self",
    api.ContinuousBatchingManager._run_generation_loop: "self use_inference_mode",
}


def check() -> None:
    """Raise ImportError where the batching library is not the one that these classes were written for."""
    changed = [f.__qualname__ for f, names in _SIGNATURES.items() if " ".join(inspect.signature(f).parameters) != names]
    if changed or not transformers.__version__.startswith("5.24."):
        raise ImportError(
            f"deltaserve needs transformers 5.24, found {transformers.__version__}"
            f"{' with other signatures of ' + ', '.join(changed) if changed else ''}: "
            "pip install 'transformers==5.24.*'"
        )
