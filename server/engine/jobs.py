"""A request inside the engine, from its admission until nothing of it runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from uuid import uuid4

from deltaserve.server.engine.requests import Finished, FinishReason, Turn
from deltaserve.server.engine.sampler import Chooser
from deltaserve.server.engine.stream import Stream
from deltaserve.server.engine.wrapped import Fitted


@dataclass(slots=True, eq=False)
class Job:
    """``digest`` and ``variant`` (empty for the base), ``slot`` and ``fitted`` (None for the base) are its variant's;
    ``release`` is called once, when it is over.

    ``began``, its first step, is on ``perf_counter``; ``turn`` knows when it came. ``id`` carries the digest, so that
    whoever knows the id knows whose the request is.
    """

    digest: str
    slot: int
    fitted: Fitted | None
    prompt: Sequence[int]
    chooser: Chooser
    stream: Stream
    release: Callable[[], None]
    variant: str = ""
    turn: Turn = field(default_factory=Turn)
    began: float | None = None
    cached_tokens: int = 0
    cancelled: bool = False
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{self.digest}|{uuid4().hex}"

    def finish(self) -> Finished:
        """How the request ended, if it did not fail."""
        generated = self.chooser.generated
        stopped = bool(generated) and generated[-1] in self.chooser.stop_ids
        count = len(generated) - stopped
        reason: FinishReason = "cancelled" if self.cancelled else "stop" if stopped or self.chooser.ended else "length"
        if self.began is None:
            return Finished(reason, len(self.prompt), count, self.cached_tokens)
        queued_s, ran_s = self.began - self.turn.arrived, perf_counter() - self.began
        return Finished(reason, len(self.prompt), count, self.cached_tokens, queued_s, ran_s)
