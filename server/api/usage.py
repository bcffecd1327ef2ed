"""``GET /v1/usage``: what was used, by day, key and model."""

from dataclasses import asdict, dataclass
from datetime import date, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request

from deltaserve.delta_store.errors import RequestRefused
from deltaserve.server.access.keys import Key
from deltaserve.server.access.usage import today
from deltaserve.server.api.responses import ERRORS

router = APIRouter(tags=["usage"], responses=ERRORS)

DAYS = 30
MOST_DAYS = 366


@dataclass(frozen=True, slots=True)
class UsageRow:
    """One model's requests with one key on one day (UTC). ``key`` is the key's id, null for requests without one.

    ``failed`` of the ``requests`` were not finished by the server's fault; ``cached_tokens`` of the prompt tokens were
    found in the cache.
    """

    day: str
    key: str | None
    model: str
    requests: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class UsageList:
    """Oldest day first; ``start`` and ``end`` are the first and the last day asked for."""

    object: Literal["list"]
    start: str
    end: str
    data: list[UsageRow]


@router.get("/v1/usage")
def get_usage(
    request: Request,
    start: Annotated[date | None, Query(description="First day (UTC), as 2026-01-31")] = None,
    end: Annotated[date | None, Query(description="Last day (UTC); today if not given")] = None,
    key: Annotated[str | None, Query(description="Only of the key with this id")] = None,
    model: Annotated[str | None, Query(description="Only of this model")] = None,
) -> UsageList:
    """Usage of the last 30 days, or those asked for; a key of role infer sees its own."""
    last = end or today()
    first = start or last - timedelta(days=min(DAYS - 1, (last - date.min).days))
    if not 0 <= (last - first).days < MOST_DAYS:
        raise RequestRefused(
            f"'start' must be at most {MOST_DAYS - 1} days before 'end'; got {first} and {last}", "start"
        )
    asking: Key | None = request.state.key
    if asking is not None and asking.role != "admin":
        key = asking.id
    rows = request.app.state.ledger.between(first, last, key, model)
    data = [UsageRow(row.day, row.key or None, row.model, **asdict(row.used)) for row in rows]
    return UsageList("list", first.isoformat(), last.isoformat(), data)
