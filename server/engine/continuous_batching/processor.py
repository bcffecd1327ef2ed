"""One step after the other: whose rows are in it, what it costs, and the tokens that come out."""

# The library has no types that mypy could look at.
# mypy: disallow-subclassing-any=False

import time
from collections import Counter, deque
from typing import Any

import torch
from transformers.generation.continuous_batching import continuous_api as api

from deltaserve.delta_store.errors import EngineError, GenerationFailed, WaitedTooLong
from deltaserve.server.engine.continuous_batching.router import Router
from deltaserve.server.engine.continuous_batching.runner import Runner
from deltaserve.server.engine.jobs import Job
from deltaserve.server.engine.policy import Policy
from deltaserve.server.engine.reports import Reports
from deltaserve.server.engine.requests import Token
from deltaserve.server.engine.routing import Routing
from deltaserve.server.engine.stream import Event, Stream, post


class Processor(api.ContinuousBatchProcessor):
    """Prepares a batch, runs it, and tells what came out."""

    def __init__(
        self,
        *,
        routing: Routing,
        policy: Policy,
        reports: Reports,
        cancelled: deque[str],
        max_wait_seconds: float | None,
        output_router: Router,
        **others: Any,
    ) -> None:
        super().__init__(output_router=output_router, **others)
        self.routing, self.policy, self.cancelled, self.router = routing, policy, cancelled, output_router
        self.max_wait_seconds = max_wait_seconds
        self.reports, self.displaced = reports, frozenset[str]()
        self.chosen: list[tuple[Job, Token | Exception]] = []
        self.finished_steps, self.moved = 0, 0.0
        """``moved``: when a step finished, or a request had its first, on ``perf_counter``."""
        self.cache.router = output_router
        self.model_runner.__class__ = Runner
        self.model_runner.router = output_router

    def prepare_next_batch(self) -> bool:
        """Drop what was cancelled or waited for too long, then let the library schedule."""
        gone = self._late() | {self.cancelled.popleft(): None for _ in range(len(self.cancelled))}
        for request_id in gone:
            self.scheduler.set_request_cancellation(request_id)
        if gone:  # the library lets displaced requests in again only when another one finishes
            self.scheduler.block_new_requests = False
        ready = super().prepare_next_batch()
        for request_id, error in gone.items():
            self.router.close(request_id, error)
        self._report_displaced()
        if not ready:
            self.policy.idle()
        return bool(ready)

    def _generation_step(self, model: torch.nn.Module) -> None:
        batch = self.inputs_and_outputs.requests_in_batch
        jobs = [self.router.jobs[f.state.request_id] for f in batch]
        lengths = [f.query_length for f in batch]
        self._report_begun(jobs)
        swapped = self.policy.before_step(jobs)
        wants_token = [f.has_new_token for f in batch]
        padding = self._padding(sum(lengths), len(batch))
        self.routing.assign(lengths, [job.slot for job in jobs], wants_token, swapped=swapped, padding=padding)
        start = time.perf_counter()
        super()._generation_step(model)
        self.chosen = self.model_runner.choose()
        self.reports.stepped(sum(lengths))
        self.policy.after_step(len(jobs) if sum(lengths) == len(jobs) else 0, time.perf_counter() - start)

    def update_batch(self) -> None:
        """Tell the streams their tokens; rows that failed leave the batch."""
        chosen, self.chosen = self.chosen, []
        tokens: list[tuple[Stream, Event]] = []
        for job, token in chosen:
            if isinstance(token, Exception):
                self.cancelled.append(job.id)
                self.router.close(job.id, token if isinstance(token, EngineError) else _failed(token))
            elif not job.cancelled and token.token_id not in job.chooser.stop_ids:
                tokens.append((job.stream, token))
        post(tokens)
        for job in (job for job, token in chosen if isinstance(token, Token) and job.chooser.ended):
            self.cancelled.append(job.id)
            self.router.close(job.id)
        for variant, count in Counter(job.variant for job, _ in chosen).items():
            self.reports.generated(variant, count)
        super().update_batch()
        self.finished_steps += 1
        self.moved = time.perf_counter()

    def _late(self) -> dict[str, WaitedTooLong | None]:
        """Requests that must not wait for their first step any longer, and what they are told."""
        if (limit_s := self.max_wait_seconds) is None:
            return {}
        waiting = list(self.router.jobs.values())  # a copy, for other threads add to them
        return {job.id: WaitedTooLong.after(limit_s) for job in waiting if job.turn.is_late(limit_s)}

    def _padding(self, rows: int, requests: int) -> tuple[int, int]:
        """How many rows of tokens, and of the head, the step has beyond those of requests."""
        io = self.inputs_and_outputs
        return io.num_q_tokens - rows, io._get_num_sequences(self.model_runner.pad_inputs) - requests

    def _report_begun(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.began is None:
                job.began = self.moved = time.perf_counter()
                job.turn.began = True
                self.router.begun += 1
                self.reports.began(job.variant, len(job.prompt), job.cached_tokens)

    def _report_displaced(self) -> None:
        """Requests that were in a batch and wait again; the library lets nobody in while there are any."""
        before, self.displaced = self.displaced, frozenset[str]()
        if self.scheduler.block_new_requests:
            waiting, jobs = self.scheduler.waiting_requests, self.router.jobs
            self.displaced = frozenset(i for i in waiting if i in jobs and jobs[i].began is not None)
            if new := len(self.displaced - before):
                self.reports.displaced(new)


def _failed(error: Exception) -> GenerationFailed:
    failure = GenerationFailed(f"No token could be chosen with these sampling settings: {error}")
    failure.__cause__ = error
    return failure
