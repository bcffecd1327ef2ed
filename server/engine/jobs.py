"""A request inside the engine, from its admission until nothing of it runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from uuid import uuid4

from deltaserve.server.engine.requests import Finished
from deltaserve.server.engine.sampler import Chooser
from deltaserve.server.engine.stream import Stream
from deltaserve.server.engine.wrapped import Fitted


@dataclass(slots=True, eq=False)
class Job:
    """``digest`` (empty for the base), ``slot`` and ``fitted`` (None for the base) are its variant's; ``release`` is
    called once, when it is over.

    ``id`` carries the digest, so that whoever knows the id knows whose the request is.
    """

    digest: str
    slot: int
    fitted: Fitted | None
    prompt: Sequence[int]
    chooser: Chooser
    stream: Stream
    release: Callable[[], None]
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
        if self.cancelled:
            return Finished("cancelled", len(self.prompt), count, self.cached_tokens)
        return Finished("stop" if stopped else "length", len(self.prompt), count, self.cached_tokens)
