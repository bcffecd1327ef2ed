"""Who is told what: the jobs by id, until they are over."""

# The library has no types that mypy could look at.
# mypy: disallow-subclassing-any=False

from transformers.generation.continuous_batching import continuous_api as api

from deltaserve.delta_store.errors import EngineError, GenerationFailed
from deltaserve.server.engine.jobs import Job
from deltaserve.server.engine.stream import post


class Router(api.OutputRouter):
    """The jobs by id, and what they are told; ``begun`` counts those that were in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[str, Job] = {}
        self.begun = 0

    def close(self, request_id: str, error: Exception | None = None) -> None:
        """The request is over; nothing of it is in the batch any more."""
        if (job := self.jobs.pop(request_id, None)) is not None:
            self.begun -= job.began is not None
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
