"""Policy ``swap``: every batch has one owner, the base or one version, and owners take turns in order of arrival."""

# mypy: disallow-subclassing-any=False

from collections import deque
from itertools import takewhile

from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import FIFOScheduler


class TakingTurns(FIFOScheduler):
    """Whose turn comes brings in all of its requests that wait then. Those that come later join while nobody else
    waits; else they queue behind, so a turn ends."""

    waiting_requests_order: deque[str]

    def _get_waiting_candidates(self) -> list[RequestState]:
        order = self.waiting_requests_order
        if not order:
            return []
        owner = owner_of(next(iter(self.active_requests), order[0]))
        if not self.active_requests:
            self.waiting_requests_order = order = deque(sorted(order, key=lambda i: owner_of(i) != owner))
        return [self.waiting_requests[i] for i in takewhile(lambda i: owner_of(i) == owner, order)]


def owner_of(request_id: str) -> str:
    """The digest of a request's version, empty for the base."""
    return request_id.partition("|")[0]
