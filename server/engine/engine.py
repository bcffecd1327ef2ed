"""The engine: one resident base, variants applied per request, tokens out."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import Artifact
from deltaserve.delta_store.errors import (
    ContextTooLong,
    EngineError,
    OptionError,
    RequestRefused,
    UnsupportedCheckpoint,
)
from deltaserve.delta_store.fingerprint import fingerprint
from deltaserve.kernels.segments import BASE
from deltaserve.server.engine import sampler
from deltaserve.server.engine.bank import Bank
from deltaserve.server.engine.base_model import load_base
from deltaserve.server.engine.continuous_batching.manager import RESTARTING, Batching
from deltaserve.server.engine.jobs import Job
from deltaserve.server.engine.limits import EngineLimits
from deltaserve.server.engine.loading import ArtifactLoader, ProfilePath
from deltaserve.server.engine.norms import can_be_captured
from deltaserve.server.engine.parallel.team import LedModel, Team, checked
from deltaserve.server.engine.policy import Policy, check_kind
from deltaserve.server.engine.reports import EngineState, Reports
from deltaserve.server.engine.requests import Sampling, Turn, Version
from deltaserve.server.engine.slots import Ticket
from deltaserve.server.engine.stream import Stream
from deltaserve.server.engine.swapping import Swapping
from deltaserve.server.engine.variant_engine import STOP_SECONDS, VariantEngine, load_tokenizer
from deltaserve.server.engine.wrapped import Fitted, VersionDeltas


class Engine(VariantEngine):
    """Loads the base (whatever ``open_checkpoint`` opens) and wraps its layers; ``start`` makes it take requests.

    ``load`` replaces the reading of artifacts, for tests. ``policy`` says what is swapped now, and how often it was.
    Raises CheckpointError, OptionError.
    """

    def __init__(
        self,
        base: str | Path,
        *,
        limits: EngineLimits | None = None,
        profile_path: ProfilePath | None = None,
        load: Callable[[Version], VersionDeltas] | None = None,
    ) -> None:
        self.limits = limits = checked(limits or EngineLimits())
        if limits.threads is not None:
            torch.set_num_threads(limits.threads)
        checkpoint = open_checkpoint(base)
        self.tokenizer = load_tokenizer(checkpoint)
        self.fingerprint = fingerprint(checkpoint)
        self._team = Team(checkpoint, self.fingerprint, limits) if limits.tensor_parallel > 1 else None
        loaded = load_base(checkpoint, limits) if self._team is None else self._team.load_base()
        model, self._wrapped = loaded.model, loaded.wrapped
        self.context_length = _context(model, limits)
        self.stop_ids = _stop_ids(model, self.tokenizer)
        check_kind(limits.policy, self._wrapped.fixed)
        self.vocab_size = self._wrapped.vocabulary
        self._artifacts = ArtifactLoader(checkpoint, self.fingerprint, profile_path, limits.host_bytes)
        self._load = load or self._artifacts
        places = self._wrapped if self._team is None else LedModel(self._team, self._wrapped)
        self.bank = Bank(places, limits.bank_slots, limits.bank_bytes, self._fitted)
        self.policy = self._policy()
        self._batching = Batching(
            model,
            loaded.routing,
            self.policy,
            backend=self._wrapped.backend,
            cache_tokens=limits.cache_tokens,
            batch_tokens=limits.batch_tokens,
            running=limits.max_running,
            flash_attention=loaded.flash_attention,
            graphs=loaded.flash_attention is not None and can_be_captured(model) and self._team is None,
            team=self._team,
            max_wait_seconds=limits.max_wait_seconds,
        )
        self._artifacts.is_disturbing = lambda: bool(self._batching.router.jobs)

    def start(self) -> None:
        """Start generating, and answer once. Raises UnsupportedCheckpoint where the base cannot run here."""
        self._batching.start()
        with ThreadPoolExecutor(1) as pool:  # for the event loop of this thread may be running
            try:
                pool.submit(asyncio.run, self._warm_up()).result()
            except EngineError as error:
                self.stop()
                raise UnsupportedCheckpoint(f"The base cannot run in continuous batches: {error}") from error

    def stop(self) -> None:
        """Stop generating and loading; what still runs fails with GenerationFailed. Cannot be started again."""
        self._batching.halt(STOP_SECONDS)
        self.bank.close()
        if self._team is not None:
            self._team.close()

    @property
    def failure(self) -> str | None:
        """Why no request is taken, None if they are."""
        if self._batching.failure is None and not self._batching.is_running():
            return "The generation thread is gone"
        return self._batching.failure or self._batching.stall

    @property
    def lost(self) -> str | None:
        """Why nothing but a restart of the process helps, None if it is not so."""
        failure = self.failure
        return None if failure == RESTARTING else failure

    @property
    def ended(self) -> str | None:
        return None if self._team is None else self._team.lost

    @property
    def requests(self) -> int:
        """Requests that are running or waiting."""
        return self._entering + len(self._batching.router.jobs)

    def watch(self, reports: Reports) -> None:
        """Tell ``reports`` what happens, from now on; before ``start``."""
        self.bank.reports = self._batching.reports = reports

    def state(self) -> EngineState:
        """What there is at this moment."""
        running = self._batching.router.begun
        residents = self.bank.residents
        return EngineState(
            running=running,
            waiting=self.requests - running,
            cold=self.bank.waiting,
            cache_used=self._batching.cache_used,
            residents=residents,
            bank_bytes=self.limits.bank_bytes,
            bank_slots=self.limits.bank_slots,
            swapped=next((r.variant for r in residents if r.digest == self.policy.swapped), ""),
            swaps=self.policy.swaps,
            swap_s=self.policy.swap_seconds,
            swap_failure=self.policy.failure,
        )

    async def submit(
        self, prompt_ids: Sequence[int], version: Version | None, sampling: Sampling, turn: Turn | None = None
    ) -> Stream:
        """Start a request for a variant's version, or for the base, and return its tokens as a stream.

        Waits until the variant is in memory. Requests that are answered together have one ``turn``. Before the first
        token it raises RequestRefused, ContextTooLong, QueueFull, EngineDown, and ArtifactError where the variant
        cannot be loaded; the stream raises WaitedTooLong where none of a turn's requests came into a batch in time.
        """
        turn = turn or Turn()
        self._check_size(prompt_ids, sampling)
        if version is None:
            return self._begin(prompt_ids, None, None, sampling, turn)
        async with self._holding(version, turn) as ticket:
            return self._begin(prompt_ids, ticket, ticket.future.result().fitted, sampling, turn)

    def _fitted(self, version: Version) -> Fitted:
        if self._team is None:
            return self._wrapped.fit(self._load(version))
        profile = self._artifacts.profile_path(version)
        return self._team.load(version, profile, lambda: self._wrapped.fit(self._load(version)))

    def _check_whole(self, artifact: Artifact, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._wrapped.check_whole(shapes, artifact.manifest.tied_head)

    def _policy(self) -> Policy:
        fixed = self.limits.policy == "mixed" or self._wrapped.fixed is not None
        return Policy(
            self.limits.policy,
            None if fixed else Swapping(self._wrapped, self._artifacts.base_tensor),
            room=lambda: self.limits.bank_bytes - self.bank.used_bytes,
            is_resident=lambda digest: digest in self.bank.holders,
        )

    def _check_size(self, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        if not prompt_ids:
            raise RequestRefused("The prompt is empty; give at least one token", param="prompt")
        sampler.check(sampling)
        wanted = len(prompt_ids) + sampling.max_tokens
        if wanted > self.context_length:
            raise ContextTooLong(
                f"The context holds {self.context_length} tokens; the prompt has {len(prompt_ids)} and max_tokens is "
                f"{sampling.max_tokens}, together {wanted}. Shorten the prompt or lower max_tokens",
                param="max_tokens" if len(prompt_ids) < self.context_length else "prompt",
            )
        self._check_room()

    def _begin(
        self,
        prompt_ids: Sequence[int],
        ticket: Ticket | None,
        fitted: Fitted | None,
        sampling: Sampling,
        turn: Turn,
    ) -> Stream:
        vocabulary = fitted.vocabulary if fitted is not None else self.vocab_size
        sampler.check_ids("prompt", prompt_ids, vocabulary)
        sampler.check_ids("logit_bias", sampling.logit_bias, vocabulary)
        stop_ids = self.stop_ids if fitted is None or fitted.stop_ids is None else fitted.stop_ids
        chooser = sampler.Chooser(sampling, prompt_ids, stop_ids)
        stream = Stream(asyncio.get_running_loop(), lambda: self._batching.cancel(job))
        job = Job(
            digest=ticket.version.digest if ticket is not None else "",
            slot=ticket.future.result().slot if ticket is not None else BASE,
            fitted=fitted,
            prompt=tuple(prompt_ids),
            chooser=chooser,
            stream=stream,
            release=(lambda: self.bank.let_go(ticket)) if ticket is not None else (lambda: None),
            variant=ticket.version.variant if ticket is not None else "",
            turn=turn,
        )
        self._batching.take(job)
        return stream

    async def _warm_up(self) -> None:
        """Answer one request, and on a GPU as many at once as there are graphs for."""
        for count in self._batching.warm_up_sizes:
            await asyncio.gather(*(self._answer(tokens=min(count, self.context_length - 1)) for _ in range(count)))

    async def _answer(self, tokens: int) -> None:
        sampling = Sampling(max_tokens=tokens, temperature=0, ignore_eos=True)
        async for _ in await self.submit([0], None, sampling, Turn(began=True)):  # however long it takes
            pass


def _context(model: PreTrainedModel, limits: EngineLimits) -> int:
    """The longest prompt and answer: what the model was made for, the limit set, and the cache allow."""
    own: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limits.context is not None and own is not None and limits.context > own:
        raise OptionError(f"context is {limits.context}, but the model has positions for {own} tokens; lower it")
    return min(length for length in (limits.context, own, limits.cache_tokens) if length is not None)


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The end-of-sequence tokens of generation config and tokenizer."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [configured] if isinstance(configured, int) else list(configured or ())
    return frozenset([*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])
