"""The generation thread: takes jobs, runs them in batches, and starts again after a failure."""

# The library has no types that mypy could look at.
# mypy: disallow-subclassing-any=False

import logging
import queue
import threading
import time
from collections import deque
from typing import Any, cast

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import continuous_api as api
from transformers.generation.continuous_batching.initialization import update_cb_config_after_cache_creation
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from deltaserve.delta_store.errors import EngineDown, GenerationFailed
from deltaserve.kernels.dispatch import Backend
from deltaserve.server.engine import attention, flash
from deltaserve.server.engine.continuous_batching.cache import SaltedCache
from deltaserve.server.engine.continuous_batching.processor import Processor
from deltaserve.server.engine.continuous_batching.router import Router
from deltaserve.server.engine.continuous_batching.turns import TakingTurns
from deltaserve.server.engine.jobs import Job
from deltaserve.server.engine.paging import reader
from deltaserve.server.engine.parallel.messages import NewCache
from deltaserve.server.engine.parallel.team import Team
from deltaserve.server.engine.policy import Policy
from deltaserve.server.engine.reports import Reports
from deltaserve.server.engine.routing import Routing

logger = logging.getLogger(__name__)

PAGE_TOKENS = 16
PADDED_QUERIES, PADDED_KEYS = 64, 1024
"""Where decoding steps are CUDA graphs, the library pads the others too: to multiples of these."""
RESTARTING = "The engine is restarting after a failure; try again"
STALL_SECONDS = 120.0
RESTARTS_IN_A_ROW = 3
"""After so many restarts without one finished step the engine stays down."""


class Batching(api.ContinuousBatchingManager):
    """The generation thread: takes jobs, runs them in batches, and starts again after a failure.

    ``flash_attention`` names the library's attention to use in place of ours. ``graphs``: steps in which each request
    decodes become CUDA graphs, one for each power of two of requests; they need flash attention's block tables.
    ``team``: other processes that compute along.
    """

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
        flash_attention: str | None = None,
        graphs: bool = False,
        team: Team | None = None,
        max_wait_seconds: float | None = None,
    ) -> None:
        page = PAGE_TOKENS if flash_attention is None else flash.PAGE_TOKENS
        self.pages = -(-cache_tokens // page)
        self._attention = flash_attention or attention.NAME
        config = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=self.pages,
            max_batch_tokens=batch_tokens,
            max_requests_per_batch=min(running, batch_tokens),
            max_blocks_per_request=0 if flash_attention is None else self.pages,
            use_cuda_graph=(False, graphs),
            q_padding_interval_size=PADDED_QUERIES,
            kv_padding_interval_size=PADDED_KEYS,
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
        self._team, self._max_wait_seconds = team, max_wait_seconds
        if team is not None:
            team.on_lost = self._refuse

    def switch_to_cb_friendly_attn(self, model: PreTrainedModel, auto_switch_to_flash: bool = False) -> None:
        model.set_attn_implementation(self._attention)

    @property
    def warm_up_sizes(self) -> list[int]:
        """How many requests to run at once before others come: each size that has a graph of its own, and one."""
        most = self.continuous_batching_config.max_requests_per_batch
        graphs = any(self.continuous_batching_config.cuda_graph_booleans)
        return [1, *(min(2**i, most) for i in range(1, (most - 1).bit_length() + 1))] if graphs else [1]

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
        if processor is None or not self.router.begun:
            return None
        seconds = time.perf_counter() - processor.moved
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

    def _generation_step(self) -> None:
        try:
            super()._generation_step()
        except Exception as error:
            if self._team is not None and (lost := self._team.verdict(error)) is not None:
                raise GenerationFailed(lost) from error
            raise

    def _create_batch_processor(self) -> Processor:
        config = self.continuous_batching_config
        if self._team is not None:
            self._team.send(NewCache(config))
        cache = SaltedCache.of(self.model, config, self.distributed_helper)
        cache.reader = self._reader
        update_cb_config_after_cache_creation(config, cache.num_blocks, cache.max_batch_tokens)
        scheduler = TakingTurns if self._policy.kind == "swap" else FIFOScheduler
        return Processor(
            routing=self._routing,
            policy=self._policy,
            reports=self.reports,
            cancelled=self._cancelled,
            max_wait_seconds=self._max_wait_seconds,
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
            if self._team is not None and self._team.lost is not None:
                return self._refuse(self._team.lost)
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
