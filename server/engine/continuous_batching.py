"""Everything that knows transformers' continuous batching: subclasses that add variants, own sampling and supervision.

The batching library is private and moves fast, so it is pinned, its signatures are checked at import, and its types
stay here. What is replaced, and why: attention (a dense mask over the whole batch is several times slower), sampling
(there it is one setting for all), the prefix hash (it knows no variants, so one would continue another's cache), and
the thread (one exception ends it for good). Steps run eagerly: no CUDA graphs, no batches prepared ahead.
"""

# The library has no types that mypy could look at.
# mypy: disallow-subclassing-any=False

import hashlib
import inspect
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextvars import ContextVar
from functools import cached_property
from itertools import islice
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import continuous_api as api
from transformers.generation.continuous_batching.cache_allocators import cache_allocator
from transformers.generation.continuous_batching.initialization import update_cb_config_after_cache_creation
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from deltaserve.delta_store.errors import EngineDown, EngineError, GenerationFailed
from deltaserve.kernels.cpu.operations import CpuBackend
from deltaserve.kernels.dispatch import Backend
from deltaserve.server.engine import attention, sampler
from deltaserve.server.engine.jobs import Job
from deltaserve.server.engine.paging import Paged, Stored, reader
from deltaserve.server.engine.policy import Policy
from deltaserve.server.engine.reports import Reports
from deltaserve.server.engine.requests import Token
from deltaserve.server.engine.routing import Routing
from deltaserve.server.engine.stream import Event, Stream, post
from deltaserve.server.engine.turns import TakingTurns, owner_of

logger = logging.getLogger(__name__)

PAGE_TOKENS = 16
EVICTIONS = 8
"""Under pressure, so many parts of all pages go at a time; the library wants 15 % of them free."""
RESTARTING = "The engine is restarting after a failure; try again"
STALL_SECONDS = 120.0
RESTARTS_IN_A_ROW = 3
"""After so many restarts without one finished step the engine stays down."""


class Router(api.OutputRouter):
    """The jobs by id, and what they are told."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[str, Job] = {}

    def close(self, request_id: str, error: Exception | None = None) -> None:
        """The request is over; nothing of it is in the batch any more."""
        if (job := self.jobs.pop(request_id, None)) is not None:
            job.release()
            post([(job.stream, error or job.finish())])

    def close_all(self, error: Exception) -> None:
        for request_id in list(self.jobs):
            self.close(request_id, error)

    def fail_and_deliver(self, state: api.RequestState, error: Exception) -> None:
        known = isinstance(error, EngineError)
        self.close(state.request_id, error if known else GenerationFailed(f"Generation failed, try again: {error}"))

    def deliver_batch(self, outputs: list[api.GenerationOutput]) -> None:
        """Called with finished requests only; their tokens are out already."""
        for output in outputs:
            self.close(output.request_id)


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


class Runner(ModelRunner):
    """The model's forward and the choice of tokens."""

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


class Processor(api.ContinuousBatchProcessor):
    """One step after the other."""

    def __init__(
        self,
        *,
        routing: Routing,
        policy: Policy,
        reports: Reports,
        cancelled: deque[str],
        output_router: Router,
        **others: Any,
    ) -> None:
        super().__init__(output_router=output_router, **others)
        self.routing, self.policy, self.cancelled, self.router = routing, policy, cancelled, output_router
        self.reports, self.displaced = reports, frozenset[str]()
        self.finished_steps, self.stepped = 0, 0.0
        self.cache.router = output_router
        self.model_runner.__class__ = Runner
        self.model_runner.router = output_router

    def prepare_next_batch(self) -> bool:
        """Drop what was cancelled, then let the library schedule."""
        gone = [self.cancelled.popleft() for _ in range(len(self.cancelled))]
        for request_id in gone:
            self.scheduler.set_request_cancellation(request_id)
        if gone:  # the library lets displaced requests in again only when another one finishes
            self.scheduler.block_new_requests = False
        ready = super().prepare_next_batch()
        for request_id in gone:
            self.router.close(request_id)
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
        self.routing.assign(lengths, [job.slot for job in jobs], wants_token, swapped=swapped)
        start = time.perf_counter()
        super()._generation_step(model)
        self.reports.stepped(sum(lengths))
        self.policy.after_step(len(jobs) if sum(lengths) == len(jobs) else 0, time.perf_counter() - start)

    def update_batch(self) -> None:
        """Tell the streams their tokens; rows that failed leave the batch."""
        chosen, self.model_runner.chosen = self.model_runner.chosen, []
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
        self.stepped = time.perf_counter()

    def _report_begun(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.began is None:
                job.began = time.perf_counter()
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


class Batching(api.ContinuousBatchingManager):
    """The generation thread: takes jobs, runs them in batches, and starts again after a failure."""

    def __init__(
        self,
        model: PreTrainedModel,
        routing: Routing,
        policy: Policy,
        *,
        backend: Backend,
        cache_tokens: int,
        batch_tokens: int,
        running: int,
    ) -> None:
        self.pages = -(-cache_tokens // PAGE_TOKENS)
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=self.pages,
            max_batch_tokens=batch_tokens,
            max_requests_per_batch=min(running, batch_tokens),
            max_blocks_per_request=0,
            use_cuda_graph=False,
            use_async_batching=False,
            auto_switch_to_flash=False,
        )
        never_ends = GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1, pad_token_id=0)
        super().__init__(model, never_ends, config)
        self._failure: str | None = "The engine is not started"
        self.output_router = self.router = Router()
        self._routing, self._policy, self.reports = routing, policy, Reports()
        self._cancelled: deque[str] = deque()
        self._stopping = False
        self._reader = reader(backend, model.device, model.dtype)
        self._taking = threading.Lock()

    def switch_to_cb_friendly_attn(self, model: PreTrainedModel, auto_switch_to_flash: bool = False) -> None:
        model.set_attn_implementation(attention.NAME)

    @property
    def failure(self) -> str | None:
        """Why no job is taken, None while all is well."""
        if self._failure is None and self.background_thread_status.can_accept_new_requests() is not None:
            return RESTARTING
        return self._failure

    @property
    def stall(self) -> str | None:
        """Said if a step has been running for longer than any should."""
        processor = cast("Processor | None", self.batch_processor)
        began = [job.began for job in list(self.router.jobs.values()) if job.began is not None]
        if processor is None or not began:
            return None
        seconds = time.perf_counter() - max(processor.stepped, *began)
        return f"No step has finished for {seconds:.0f} s" if seconds > STALL_SECONDS else None

    @property
    def cache_used(self) -> float:
        """The share of the key-value cache that requests hold."""
        processor = self.batch_processor
        tables: list[Any] = (
            [] if processor is None else [a.block_table for a in processor.cache.cache_allocators.values()]
        )
        held = [len({page for pages in list(table.values()) for page in list(pages)}) for table in tables]
        return max(held, default=0) / self.pages

    def start(self) -> None:
        """Start the thread; as a daemon, for it must not keep a process alive that is done."""
        self._stopping, self._failure = False, None
        self.background_thread_status.clear()
        self._generation_thread = threading.Thread(
            target=self._run_generation_loop, args=(True,), name="generation", daemon=True
        )
        self._generation_thread.start()

    def halt(self, timeout: float) -> None:
        """Stop the thread; what still runs fails."""
        self._stopping = True
        if self.is_running():
            self.stop(timeout=timeout, hard_stop=True)
        self._refuse("The engine was stopped")

    def take(self, job: Job) -> None:
        """Queue a job that was found to fit. Raises EngineDown; then ``release`` was not and will not be called."""
        with self._taking:
            if self.failure is not None:
                raise EngineDown(self.failure)
            self.router.jobs[job.id] = job
            sampling = job.chooser.sampling
            ids = list(job.chooser.stop_ids) or -1
            taken = self.add_request(list(job.prompt), job.id, sampling.max_tokens, eos_token_id=ids)
            if taken is None:  # it failed just now
                del self.router.jobs[job.id]
                raise EngineDown(RESTARTING)

    def cancel(self, job: Job) -> None:
        """Take a job out of the batch before the next step."""
        if not job.cancelled and job.id in self.router.jobs:
            job.cancelled = True
            self._cancelled.append(job.id)
            self._wake_up_loop.set()

    def _create_batch_processor(self) -> Processor:
        config = self.continuous_batching_config
        cache = SaltedCache(
            config=self.model.config.get_text_config(),
            continuous_batching_config=config,
            device=self.model.device,
            distributed_helper=self.distributed_helper,
            dtype=self.model.dtype,
            model_supports_logits_to_keep=self.model._supports_logits_to_keep(),
        )
        cache.reader = self._reader
        update_cb_config_after_cache_creation(config, cache.num_blocks, cache.max_batch_tokens)
        scheduler = TakingTurns if self._policy.kind == "swap" else FIFOScheduler
        return Processor(
            routing=self._routing,
            policy=self._policy,
            reports=self.reports,
            cancelled=self._cancelled,
            cache=cache,
            config=self.model.config.get_text_config(),
            generation_config=self.generation_config,
            continuous_batching_config=config,
            logit_processor=self.logit_processor,
            input_queue=self.input_queue,
            cancel_queue=self.cancel_queue,
            output_router=self.output_router,
            background_thread_status=self.background_thread_status,
            model_device=self.model.device,
            model_dtype=self.model.dtype,
            scheduler=scheduler(cache, config.safety_margin, config.max_requests_per_batch),
            distributed_helper=self.distributed_helper,
        )

    def _run_generation_loop(self, use_inference_mode: bool) -> None:
        """The library's loop, started again with an empty cache when it dies."""
        fruitless = 0
        while True:
            super()._run_generation_loop(use_inference_mode)
            error = self.background_thread_status.fatal_error
            if error is None or self._stopping:
                return self._refuse("The engine was stopped")
            steps = self.batch_processor.finished_steps if self.batch_processor is not None else 0
            fruitless = 0 if steps else fruitless + 1
            try:
                self._policy.restore()
            except EngineDown as lost:
                return self._refuse(str(lost))
            if fruitless == RESTARTS_IN_A_ROW:
                return self._refuse(f"The engine failed {fruitless} times in a row and stays down: {error}")
            self._start_over(error, pause=0.1 * 2**fruitless if fruitless else 0)

    def _start_over(self, error: Exception, pause: float) -> None:
        logger.error("Generation failed and starts again with an empty cache: %s", error)
        with self._taking:
            self._failure = RESTARTING
        self._drop_everything(GenerationFailed(f"Generation failed, try again: {error}"))
        self.batch_processor = None
        time.sleep(pause)
        with self._taking:
            self.background_thread_status.clear()
            self._failure = None

    def _refuse(self, reason: str) -> None:
        with self._taking:
            self._failure = reason
        self._drop_everything(GenerationFailed(reason))

    def _drop_everything(self, error: Exception) -> None:
        while True:
            try:
                self.input_queue.get_nowait()
            except queue.Empty:
                break
        self._cancelled.clear()
        self.router.close_all(error)


_SIGNATURES: dict[Callable[..., Any], str] = {
    _unsalted_block_hash: "parent_hash tokens",
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
    FIFOScheduler._get_waiting_candidates: "self",
    api.ContinuousBatchProcessor.prepare_next_batch: "self",
    api.ContinuousBatchProcessor._generation_step: "self model",
    api.ContinuousBatchProcessor.update_batch: "self",
    api.ContinuousBatchingManager.switch_to_cb_friendly_attn: "self model auto_switch_to_flash",
    api.ContinuousBatchingManager.add_request: (
        "self input_ids request_id max_new_tokens streaming record_timestamps eos_token_id logit_processor_kwargs"
    ),
    api.ContinuousBatchingManager._create_batch_processor: "self",
    api.ContinuousBatchingManager._run_generation_loop: "self use_inference_mode",
}


def _check_library() -> None:
    """Raise ImportError where the batching library is not the one that these classes were written for."""
    changed = [f.__qualname__ for f, names in _SIGNATURES.items() if " ".join(inspect.signature(f).parameters) != names]
    if changed or not transformers.__version__.startswith("5.24."):
        raise ImportError(
            f"deltaserve needs transformers 5.24, found {transformers.__version__}"
            f"{' with other signatures of ' + ', '.join(changed) if changed else ''}: "
            "pip install 'transformers==5.24.*'"
        )


_check_library()
cache_allocator.compute_block_hash = salted_block_hash
