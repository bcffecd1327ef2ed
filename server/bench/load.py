"""A closed loop: so many clients, each of which sends its next request when its last one has ended."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import httpx

from deltaserve.delta_store.errors import OptionError
from deltaserve.server.bench.client import Ask, Asking, Record, send


def endpoint_root(url: str) -> str:
    """The address under which the OpenAI routes are: with or without ``/v1`` is the same to the user."""
    root = url.rstrip("/")
    if not root.startswith(("http://", "https://")):
        raise OptionError(f"{url!r} is no address; write it as http://host:port")
    return root if root.endswith("/v1") else root + "/v1"


@asynccontextmanager
async def open_client(url: str, api_key: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client without limits of its own: the pool of httpx would hold back all but 100 requests, unseen."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=endpoint_root(url), headers=headers, limits=limits, timeout=None) as client:
        yield client


async def served_models(client: httpx.AsyncClient, timeout_s: float = 30.0) -> list[str]:
    """The model names of ``/v1/models``, in the server's order."""
    try:
        response = await client.get("/models", timeout=timeout_s)
        response.raise_for_status()
        return [str(model["id"]) for model in response.json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{client.base_url} does not list its models ({error}); is a server there?") from error


async def closed_loop(
    client: httpx.AsyncClient,
    asking: Asking,
    asks: Sequence[Ask],
    concurrency: int,
    on_record: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Sends all of ``asks``, ``concurrency`` at a time, and returns their records in order of completion."""
    records: list[Record] = []
    waiting = iter(asks)

    async def one_client(waiting: Iterator[Ask]) -> None:
        for ask in waiting:
            record = await send(client, asking, ask)
            records.append(record)
            on_record(record)

    async with asyncio.TaskGroup() as clients:
        for _ in range(min(concurrency, len(asks))):
            clients.create_task(one_client(waiting))
    return records
