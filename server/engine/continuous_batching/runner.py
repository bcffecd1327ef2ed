"""The model's forward, in a CUDA graph where there can be one, and the choice of tokens behind it."""

# The library has no types that mypy could look at.
# mypy: disallow-subclassing-any=False

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.utils import stream_context

from deltaserve.server.engine import attention, sampler
from deltaserve.server.engine.continuous_batching.router import Router
from deltaserve.server.engine.jobs import Job
from deltaserve.server.engine.requests import Token

logger = logging.getLogger(__name__)


class Runner(ModelRunner):
    """One for all steps. ``scores`` float32 ``[rows of the head, vocabulary]`` are those of the last one.

    While steps are padded, for graphs, they stay in one place, into which a graph writes. A step with a variant whose
    vocabulary is longer than the base's has wider ones, and no graph.
    """

    router: Router
    scores: Tensor
    is_widened = False
    _static_scores: Tensor | None = None

    def compute_batch(self, model: torch.nn.Module, batch_data: dict[str, Any]) -> None:
        """One step, with the keys laid out as the attention wants them."""
        if self.pad_inputs:
            head: Any = model.get_output_embeddings()  # type: ignore[operator]
            self.is_widened = head.widest > head.own
            self.scores = self._place_of_scores(head)
        if (stream := self.inputs_and_outputs.compute_stream) is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))  # which wrote this step, and loaded variants
        super().compute_batch(model, batch_data | self._layout(model, batch_data))

    def choose(self) -> list[tuple[Job, Token | Exception]]:
        """A token for each request that wants one, once the step is over; their rows come first."""
        jobs = [
            self.router.jobs[f.state.request_id] for f in self.inputs_and_outputs.requests_in_batch if f.has_new_token
        ]
        tokens = sampler.choose(self.scores[: len(jobs)], [job.chooser for job in jobs])
        ids = [token.token_id if isinstance(token, Token) else 0 for token in tokens]
        output = self.inputs_and_outputs.output_ids
        output[0, : len(ids)] = torch.tensor(ids, dtype=output.dtype, device=output.device)
        return list(zip(jobs, tokens, strict=True))

    def _layout(self, model: Any, batch_data: dict[str, Any]) -> dict[str, Any]:
        """What our own attention wants to know; the library's brings all that is asked for otherwise."""
        if model.config._attn_implementation != attention.NAME:
            return {}
        batch = self.inputs_and_outputs.requests_in_batch
        if self.cache.reader is not None:
            return {"paged": self.cache.pages_of(batch)}
        reads = batch_data["read_index"][0]
        gathered = reads.numel() > 0
        spans = attention.Spans.of(
            [f.query_length for f in batch], [f.state.position_offset for f in batch], gathered=gathered
        ).to(reads.device)
        if not gathered:
            return {"spans": spans}
        padding = self.cache.cache_allocators["full_attention"].read_trash_index
        return {"spans": spans, "read_index": [spans.gather(reads, padding)]}

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """Keep the scores; what a graph captures chooses nothing."""
        if self.pad_inputs and not self.is_widened:
            self.scores[: scores.shape[1]].copy_(scores[0])
        else:
            self.scores = scores[0]

    def _place_of_scores(self, head: Any) -> Tensor:
        if self._static_scores is None:
            rows = self.inputs_and_outputs.max_requests_per_batch
            self._static_scores = torch.zeros(rows, head.own, device=self.inputs_and_outputs.device)
        return self._static_scores

    def _get_forward_fn(self, use_block_table: bool) -> tuple[Callable[..., None], bool]:
        forward, in_graph = super()._get_forward_fn(use_block_table)
        return forward, in_graph and not self.is_widened

    def _capture_graph(self, forward_fn: Callable[..., None], compute_stream: Any, *args: Any) -> None:
        try:
            super()._capture_graph(forward_fn, compute_stream, *args)
        except RuntimeError:  # nothing is wrong with the step as such: it is made again
            logger.exception("A step cannot be captured as a CUDA graph; from now on all steps run without")
            self.use_cuda_graph_varlen = self.use_cuda_graph_decode = False
            with stream_context(compute_stream):
                forward_fn(*args)
