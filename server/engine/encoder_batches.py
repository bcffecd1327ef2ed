"""The thread that runs an encoder: takes what has arrived, in turns, as one batch after the other."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from deltaserve.delta_store.errors import EngineDown, GenerationFailed, WaitedTooLong
from deltaserve.server.engine.encoder_model import FittedEncoder
from deltaserve.server.engine.reports import Reports
from deltaserve.server.engine.requests import Turn

logger = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 3
"""Of batches, after which the model is asked whether it works at all."""


@dataclass(slots=True, eq=False)
class Work:
    """A request: ``texts`` of token ids of one variant, of which each gets a vector or, with ``classify``, its scores.

    ``digest`` and ``variant`` (empty for the base), ``slot`` and ``fitted`` (None for the base) are its variant's;
    ``release`` is called once, when nothing of it runs. ``future`` gives ``results``; cancelling it ends the request.
    """

    texts: Sequence[Sequence[int]]
    classify: bool
    digest: str
    variant: str
    slot: int
    fitted: FittedEncoder | None
    release: Callable[[], None]
    turn: Turn
    future: "Future[list[Tensor]]" = field(default_factory=Future)
    results: dict[int, Tensor] = field(default_factory=dict)
    taken: int = 0

    @property
    def is_exclusive(self) -> bool:
        """Whether its texts share a batch with no other variant's."""
        return self.fitted is not None and bool(self.fitted.whole)


class Text(NamedTuple):
    """One text of a request."""

    work: Work
    number: int

    @property
    def ids(self) -> Sequence[int]:
        return self.work.texts[self.number]


class Batches:
    """``run`` gives a tensor for each text of a batch; ``check`` raises where the model does not work at all.

    A batch has at most ``limit`` tokens, or one text. Requests take turns: each has a text in the batch before one has
    two. Where a batch fails, its requests are run one by one, so that each fails for itself. Those of which no text
    came into a batch within ``max_wait_seconds`` fail with WaitedTooLong. ``failure`` says why nothing is taken any
    more.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Text]], Sequence[Tensor]],
        check: Callable[[], None],
        limit: int,
        max_wait_seconds: float | None,
    ) -> None:
        self.failure: str | None = "The engine is not started"
        self.reports = Reports()
        self._run_batch, self._check, self._limit = run, check, limit
        self._max_wait_seconds = max_wait_seconds
        self._waiting: deque[Work] = deque()
        self._unfinished: set[Work] = set()
        self._failures = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="encoder", daemon=True)

    @property
    def running(self) -> int:
        """Requests of which a text has been in a batch."""
        with self._changed:
            return sum(work.taken > 0 for work in self._unfinished)

    @property
    def requests(self) -> int:
        """Requests that are running or waiting."""
        with self._changed:
            return len(self._unfinished)

    def start(self) -> None:
        """Start taking requests."""
        self.failure = None
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Take nothing more; what is there fails."""
        self._refuse("The engine was stopped")
        if self._thread.is_alive():
            self._thread.join(timeout)

    def take(self, work: Work) -> None:
        """Queue a request that was found to fit. Raises EngineDown; then ``release`` was not and will not be called."""
        with self._changed:
            if self.failure is not None:
                raise EngineDown(self.failure)
            self._waiting.append(work)
            self._unfinished.add(work)
            self._changed.notify()

    def _loop(self) -> None:
        try:
            while (batch := self._next()) is not None:
                self._step(batch)
                if self._failures >= FAILURES_IN_A_ROW:
                    self._check()
                    self._failures = 0
        except Exception as error:  # whoever asks for its health must be told
            logger.exception("The encoder does not work any more")
            self._refuse(f"The encoder does not work any more: {error}")

    def _next(self) -> list[Text] | None:
        """The texts of the next batch, those of one variant together; None when there will be none."""
        with self._changed:
            while True:
                for work in [work for work in self._waiting if work.future.cancelled()]:
                    self._waiting.remove(work)
                    self._close(work)
                self._fail_late()
                self._changed.wait_for(lambda: self._waiting or self.failure is not None)
                if self.failure is not None:
                    return None
                if batch := self._fill():
                    return sorted(batch, key=lambda text: (text.work.slot, len(text.ids)))

    def _fail_late(self) -> None:
        if (limit_s := self._max_wait_seconds) is not None:
            for work in [work for work in self._waiting if work.turn.is_late(limit_s)]:
                self._fail(work, WaitedTooLong.after(limit_s))

    def _fill(self) -> list[Text]:
        batch: list[Text] = []
        tokens = 0
        passed: list[Work] = []
        while self._waiting:
            work = self._waiting.popleft()
            if work.future.cancelled():
                passed.append(work)
                continue
            if batch and not _may_share(batch[0].work, work):
                passed.append(work)
                continue
            text = Text(work, work.taken)
            if batch and tokens + len(text.ids) > self._limit:
                passed.append(work)
                break
            if not work.taken:
                self.reports.began(work.variant, sum(map(len, work.texts)), 0)
            work.taken += 1
            work.turn.began = True
            tokens += len(text.ids)
            batch.append(text)
            if work.taken < len(work.texts):
                self._waiting.append(work)
        self._waiting.extendleft(reversed(passed))  # they come first in the next batch
        return batch

    def _step(self, batch: Sequence[Text]) -> None:
        try:
            results = self._run_batch(batch)
        except Exception as error:  # of one request, or of all: found out by running them apart
            works = list(dict.fromkeys(text.work for text in batch))
            if len(works) > 1:
                logger.warning("A batch of %d requests failed and is run again, one by one: %s", len(works), error)
                for work in works:
                    self._step([text for text in batch if text.work is work])
                return
            logger.error("A request to an encoder failed", exc_info=error)
            self._failures += 1
            return self._fail(works[0], GenerationFailed(f"The model failed on this request: {error}"))
        self._failures = 0
        self.reports.stepped(sum(len(text.ids) for text in batch))
        for (work, number), result in zip(batch, results, strict=True):
            if not bool(result.isfinite().all()):
                self._fail(work, GenerationFailed("The model gave numbers for this request that are not finite"))
            work.results[number] = result
            if len(work.results) == len(work.texts) and self._close(work):
                work.future.set_result([work.results[i] for i in range(len(work.texts))])

    def _fail(self, work: Work, error: Exception) -> None:
        with self._changed:
            if work in self._waiting:
                self._waiting.remove(work)
        if self._close(work):
            work.future.set_exception(error)

    def _close(self, work: Work) -> bool:
        """Nothing of the request runs any more. Whether somebody waits to hear how it ended."""
        with self._changed:
            if work not in self._unfinished:
                return False
            self._unfinished.remove(work)
        work.release()
        return work.future.set_running_or_notify_cancel()

    def _refuse(self, reason: str) -> None:
        with self._changed:
            self.failure = reason
            self._waiting.clear()
            left = list(self._unfinished)
            self._changed.notify_all()
        for work in left:
            self._fail(work, GenerationFailed(reason))


def _may_share(one: Work, other: Work) -> bool:
    return one.digest == other.digest or not (one.is_exclusive or other.is_exclusive)
