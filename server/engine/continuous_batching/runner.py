"""The model's forward, and the choice of tokens."""

# The library has no types that mypy could look at.
# mypy: disallow-subclassing-any=False

from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.model_runner import ModelRunner

from deltaserve.server.engine import attention, sampler
from deltaserve.server.engine.continuous_batching.router import Router
from deltaserve.server.engine.requests import Token


class Runner(ModelRunner):
    """One for all steps."""

    router: Router

    def compute_batch(self, model: torch.nn.Module, batch_data: dict[str, Any]) -> None:
        """One step, with the keys laid out as the attention wants them."""
        batch = self.inputs_and_outputs.requests_in_batch
        if self.cache.reader is not None:
            return super().compute_batch(model, batch_data | {"paged": self.cache.pages_of(batch)})
        reads = batch_data["read_index"][0]
        gathered = reads.numel() > 0
        spans = attention.Spans.of(
            [f.query_length for f in batch], [f.state.position_offset for f in batch], gathered=gathered
        )
        if gathered:
            padding = self.cache.cache_allocators["full_attention"].read_trash_index
            batch_data["read_index"] = [spans.gather(reads, padding)]
        super().compute_batch(model, batch_data | {"spans": spans})

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """Choose for the rows that want a token; the others come last and are not looked at."""
        jobs = [
            self.router.jobs[f.state.request_id] for f in self.inputs_and_outputs.requests_in_batch if f.has_new_token
        ]
        self.chosen = list(
            zip(jobs, sampler.choose(scores[0, : len(jobs)], [job.chooser for job in jobs]), strict=True)
        )
        ids = [token.token_id if isinstance(token, Token) else 0 for _, token in self.chosen]
        output_ids[0, : len(ids)] = torch.tensor(ids, dtype=output_ids.dtype, device=output_ids.device)
