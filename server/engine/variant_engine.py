"""What engines of decoders and of encoders have in common: a bank of variants, and requests that wait for theirs."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.codec.artifact import Artifact
from deltaserve.delta_store.errors import (
    CheckpointError,
    EngineDown,
    OptionError,
    QueueFull,
    UnsupportedArtifact,
    WaitedTooLong,
)
from deltaserve.server.engine.bank import Bank, Tier
from deltaserve.server.engine.limits import EngineLimits
from deltaserve.server.engine.loading import ArtifactLoader
from deltaserve.server.engine.requests import Turn, Version
from deltaserve.server.engine.slots import Ticket

STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Fit:
    """How many tensors of an artifact apply here, of how many."""

    applied: int
    total: int


class VariantEngine(ABC):
    """``bank`` has the variants in memory, ``limits`` says how it runs."""

    limits: EngineLimits
    bank: Bank
    _artifacts: ArtifactLoader
    _entering = 0
    """Requests that wait for their variant."""

    @property
    @abstractmethod
    def failure(self) -> str | None:
        """Why no request is taken, None if they are."""

    @property
    @abstractmethod
    def requests(self) -> int:
        """Requests that are running or waiting."""

    @property
    def lost(self) -> str | None:
        """Why nothing but a restart of the process helps, None if it is not so."""
        return self.failure

    @property
    def ended(self) -> str | None:
        """Why the process is to end, since it can do nothing any more; None if it can."""
        return None

    def ready(self) -> bool:
        """Whether requests are taken now."""
        return self.failure is None

    def forget(self, digest: str) -> None:
        """Free a version's memory, now or when its last request is over."""
        self.bank.forget(digest)
        self._artifacts.opened.forget(digest)

    def tier(self, digest: str) -> Tier:
        """Where a version is: in the bank (``resident``), on its way there, opened on the host, or in the store."""
        return self.bank.state(digest) or ("host" if digest in self._artifacts.opened else "store")

    def check_fits(self, artifact: Artifact) -> Fit:
        """The receipt for an artifact. Raises BaseMismatch, and UnsupportedArtifact where it does not apply whole."""
        self._artifacts.check_base(artifact)
        if not artifact.names:
            raise UnsupportedArtifact(
                f"{artifact.path} changes nothing: it holds no tensor that differs from the base's"
            )
        self._check_whole(artifact, {name: artifact.specs(name)[0].shape for name in artifact.names})
        return Fit(len(artifact.names), len(artifact.names))

    @abstractmethod
    def _check_whole(self, artifact: Artifact, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UnsupportedArtifact where deltas of these shapes, all told, do not fit."""

    @asynccontextmanager
    async def _holding(self, version: Version, turn: Turn) -> AsyncIterator[Ticket]:
        """A ticket whose version is in memory; what the context raises lets it go, else that is for whoever took it.

        Raises ArtifactError where the version cannot be loaded, WaitedTooLong where it did not come in time.
        """
        self._entering += 1
        ticket = self.bank.hold(version)
        try:
            if not ticket.future.done():
                await self._in_memory(ticket, turn)
            yield ticket
        except BaseException:  # refused, or given up waiting: asyncio's CancelledError is no Exception
            self.bank.let_go(ticket)
            raise
        finally:
            self._entering -= 1

    async def _in_memory(self, ticket: Ticket, turn: Turn) -> None:
        began, limit_s = perf_counter(), self.limits.max_wait_seconds
        left_s = None if limit_s is None else turn.arrived + limit_s - began
        try:
            await asyncio.wait_for(asyncio.wrap_future(ticket.future), left_s)
        except TimeoutError:
            assert limit_s is not None
            raise WaitedTooLong.after(limit_s) from None
        self.bank.reports.waited(ticket.version.variant, perf_counter() - began)

    def _check_room(self) -> None:
        """Raise QueueFull, EngineDown."""
        if (room := self.limits.max_running + self.limits.max_waiting) <= self.requests:
            raise QueueFull(f"{room} requests are running or waiting, and no more may; try again later")
        if (failure := self.failure) is not None:
            raise EngineDown(failure)


def checked_kind(weights: str) -> str:
    """One of those that there are. Raises OptionError."""
    if weights not in ("plain", "int8", "packed"):
        raise OptionError(f"Unknown kind of weights {weights!r}; known are plain, int8, packed")
    return weights


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Raises CheckpointError."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint.folder} has no tokenizer that can be loaded: {reason}") from error
