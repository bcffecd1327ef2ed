"""The engine of an encoder: one resident base, variants applied per text, vectors and class scores out."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from deltaserve.delta_store.checkpoint import Checkpoint, open_checkpoint
from deltaserve.delta_store.codec.artifact import Artifact
from deltaserve.delta_store.errors import (
    ContextTooLong,
    OptionError,
    RequestRefused,
)
from deltaserve.delta_store.fingerprint import fingerprint
from deltaserve.delta_store.heads import variant_architecture
from deltaserve.kernels.segments import BASE
from deltaserve.server.engine.bank import Bank
from deltaserve.server.engine.device import choose
from deltaserve.server.engine.encoder_attention import similar
from deltaserve.server.engine.encoder_batches import Batches, Text, Work
from deltaserve.server.engine.encoder_head import Head
from deltaserve.server.engine.encoder_model import EncoderDeltas, FittedEncoder, Hidden, WrappedEncoder
from deltaserve.server.engine.encoder_pooling import pooling_of
from deltaserve.server.engine.limits import EngineLimits
from deltaserve.server.engine.loading import ArtifactLoader, ProfilePath
from deltaserve.server.engine.reports import EngineState, Reports
from deltaserve.server.engine.requests import Turn, Version
from deltaserve.server.engine.slots import SPARE, Ticket
from deltaserve.server.engine.variant_engine import STOP_SECONDS, VariantEngine, checked_kind, load_tokenizer


class EncoderEngine(VariantEngine):
    """Loads the base (whatever ``open_checkpoint`` opens) and wraps its layers; ``start`` makes it take requests.

    ``load`` replaces the reading of artifacts, for tests. ``limits.batch_tokens`` bounds a batch, ``max_running`` and
    ``max_waiting`` together the requests. ``width`` is that of its vectors. Raises CheckpointError, OptionError.
    """

    def __init__(
        self,
        base: str | Path,
        *,
        limits: EngineLimits | None = None,
        profile_path: ProfilePath | None = None,
        load: Callable[[Version], EncoderDeltas] | None = None,
    ) -> None:
        self.limits = limits = limits or EngineLimits()
        if limits.threads is not None:
            torch.set_num_threads(limits.threads)
        if limits.policy == "swap":
            raise OptionError("An encoder applies deltas beside its weights; use policy auto or mixed")
        if limits.device == "cuda":
            raise OptionError("Encoders run on the CPU; use device cpu or auto")
        if limits.tensor_parallel > 1:
            raise OptionError("Encoders run in one process; use tensor_parallel 1")
        _, kernels = choose("cpu", limits.backend)
        checkpoint = open_checkpoint(base)
        self.pooling = pooling_of(checkpoint.folder)
        self.tokenizer = load_tokenizer(checkpoint)
        self.fingerprint = fingerprint(checkpoint)
        self._architecture = checkpoint.architecture
        self._artifacts = ArtifactLoader(checkpoint, self.fingerprint, profile_path, limits.host_bytes)
        self.model = WrappedEncoder(
            _load_model(checkpoint, limits.dtype),
            checkpoint.architecture,
            self._artifacts.base_tensor,
            limits.bank_slots + SPARE,
            kernels,
            kept=checked_kind(limits.weights),
        )
        self.vocab_size = self.model.vocabulary
        self.width = self.model.width
        self.context_length = _longest_text(checkpoint, self.model.form.first, self.pooling.longest, limits)
        load = load or self._load
        self.bank = Bank(
            self.model,  # type: ignore[arg-type]  # install and clear are all that the bank asks of it
            limits.bank_slots,
            limits.bank_bytes,
            lambda version: self.model.fit(load(version)),  # type: ignore[arg-type,return-value]
        )
        self._batches = Batches(self._run, self._check, limits.batch_tokens, limits.max_wait_seconds)
        self._artifacts.is_disturbing = lambda: self._batches.requests > 0

    def start(self) -> None:
        """Start taking requests."""
        self._batches.start()

    def stop(self) -> None:
        """Stop running and loading; what is there fails with GenerationFailed. Cannot be started again."""
        self._batches.stop(STOP_SECONDS)
        self.bank.close()

    @property
    def failure(self) -> str | None:
        """Why no request is taken, None if they are."""
        return self._batches.failure

    @property
    def requests(self) -> int:
        """Requests that are running or waiting."""
        return self._entering + self._batches.requests

    def watch(self, reports: Reports) -> None:
        """Tell ``reports`` what happens, from now on; before ``start``."""
        self.bank.reports = self._batches.reports = reports

    def state(self) -> EngineState:
        """What there is at this moment."""
        running = self._batches.running
        return EngineState(
            running=running,
            waiting=self.requests - running,
            cold=self.bank.waiting,
            residents=self.bank.residents,
            bank_bytes=self.limits.bank_bytes,
            bank_slots=self.limits.bank_slots,
        )

    async def embed(self, texts: Sequence[Sequence[int]], version: Version | None) -> list[Tensor]:
        """float32 ``[width]`` for each text of token ids, by a variant's version or the base.

        Waits until the variant is in memory. Raises RequestRefused, ContextTooLong, QueueFull, EngineDown,
        GenerationFailed, and ArtifactError where the variant cannot be loaded.
        """
        return (await self._answer(texts, version, classify=False))[1]

    async def classify(self, texts: Sequence[Sequence[int]], version: Version | None) -> tuple[Head, list[Tensor]]:
        """The head, which has the labels, and float32 ``[labels]`` for each text; raises as ``embed``."""
        head, scores = await self._answer(texts, version, classify=True)
        if head is None:
            raise RequestRefused("This model has no classification head", "model")
        return head, scores

    async def _answer(
        self, texts: Sequence[Sequence[int]], version: Version | None, *, classify: bool
    ) -> tuple[Head | None, list[Tensor]]:
        self._check_size(texts)
        turn = Turn()
        if version is None:
            return self.model.head, await self._results(texts, None, None, classify, turn)
        async with self._holding(version, turn) as ticket:
            fitted: Any = ticket.future.result().fitted
            results = self._results(texts, ticket, fitted, classify, turn)
        return fitted.head, await results

    def _results(
        self,
        texts: Sequence[Sequence[int]],
        ticket: Ticket | None,
        fitted: FittedEncoder | None,
        classify: bool,
        turn: Turn,
    ) -> "asyncio.Future[list[Tensor]]":
        """Queue the texts. Raises RequestRefused, EngineDown; then the ticket is still the caller's."""
        vocabulary = self.vocab_size if fitted is None else fitted.vocabulary
        for token in (token for text in texts for token in text):
            if not 0 <= token < vocabulary:
                raise RequestRefused(f"'input' must hold token ids from 0 to {vocabulary - 1}; got {token}", "input")
        if classify and (self.model.head if fitted is None else fitted.head) is None:
            raise RequestRefused("This model has no classification head; ask a variant that has one", "model")
        work = Work(
            texts=texts,
            classify=classify,
            digest=ticket.version.digest if ticket is not None else "",
            variant=ticket.version.variant if ticket is not None else "",
            slot=ticket.future.result().slot if ticket is not None else BASE,
            fitted=fitted,
            release=(lambda: self.bank.let_go(ticket)) if ticket is not None else (lambda: None),
            turn=turn,
        )
        self._batches.take(work)
        return asyncio.wrap_future(work.future)

    def _check_size(self, texts: Sequence[Sequence[int]]) -> None:
        for text in texts:
            if not text:
                raise RequestRefused("A text of 'input' is empty; give at least one token", "input")
            if len(text) > self.context_length:
                raise ContextTooLong(
                    f"The model reads {self.context_length} tokens; a text of 'input' has {len(text)}. Shorten it",
                    "input",
                )
        self._check_room()

    def _check_whole(self, artifact: Artifact, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.model.check(shapes, variant_architecture(self._architecture, artifact))

    def _load(self, version: Version) -> EncoderDeltas:
        artifact = self._artifacts.open(version)
        return EncoderDeltas(self._artifacts.deltas(artifact), variant_architecture(self._architecture, artifact))

    def _run(self, batch: Sequence[Text]) -> list[Tensor]:
        """Vector or scores of each text; those of one variant stand together."""
        fitted = batch[0].work.fitted
        hidden = self.model.run(
            [text.ids for text in batch],
            [text.work.slot for text in batch],
            fitted.whole if fitted is not None else {},
        )
        vectors = self.pooling.embed(hidden.rows, hidden.lengths)
        results = list(vectors.unbind())
        by_head: dict[Head, list[int]] = {}
        for i, text in enumerate(batch):
            head = self.model.head if text.work.fitted is None else text.work.fitted.head
            if text.work.classify and head is not None:
                by_head.setdefault(head, []).append(i)
        for head, members in by_head.items():
            for i, scores in zip(members, _scores(head, hidden, members), strict=True):
                results[i] = scores
        return results

    def _check(self) -> None:
        self.model.run([[0, 0]], [BASE], {})


def _scores(head: Head, hidden: Hidden, members: Sequence[int]) -> list[Tensor]:
    """float32 ``[labels]`` for each of these texts of a batch; texts of similar lengths are classified together."""
    texts = torch.split(hidden.rows, hidden.lengths.tolist())
    scores: dict[int, Tensor] = {}
    for group in similar([len(texts[i]) for i in members]):
        chosen = [members[i] for i in group]
        padded = torch.nn.utils.rnn.pad_sequence([texts[i].float() for i in chosen], batch_first=True)
        kept = torch.arange(padded.shape[1])[None] < hidden.lengths[chosen, None]
        pooled = None if hidden.pooled is None else hidden.pooled[chosen].float()
        scores |= zip(chosen, head.scores(padded, kept, pooled), strict=True)
    return [scores[i] for i in members]


def _load_model(checkpoint: Checkpoint, dtype: str) -> Any:
    model_class = getattr(transformers, checkpoint.architecture.name)
    return model_class.from_pretrained(checkpoint.folder, dtype=getattr(torch, dtype)).eval()


def _longest_text(checkpoint: Checkpoint, first: int | None, made_for: int | None, limits: EngineLimits) -> int:
    """The model's positions, or what it was made for if that is less; ``context`` may ask for another length."""
    positions: int | None = getattr(checkpoint.architecture.config, "max_position_embeddings", None)
    most = None if positions is None else positions - (first or 0)
    if limits.context is not None and most is not None and limits.context > most:
        raise OptionError(f"context is {limits.context}, but the model has positions for {most} tokens; lower it")
    if limits.context is not None:
        return limits.context
    return min(length for length in (most, made_for, 2**16) if length is not None)
