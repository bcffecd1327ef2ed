"""How requests are sent: closed loop, a client's next one after its last; open loop, each when it is due."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
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
    asks: Iterable[Ask],
    concurrency: int,
    on_record: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Sends all of ``asks``, ``concurrency`` at a time, and returns their records in order of completion.

    Each is taken from ``asks`` when it is sent: a generator may go by the clock.
    """
    records: list[Record] = []
    waiting = iter(asks)

    async def one_client(waiting: Iterator[Ask]) -> None:
        for ask in waiting:
            record = await send(client, asking, ask)
            records.append(record)
            on_record(record)

    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(one_client(waiting))
    return records


async def open_loop(
    client: httpx.AsyncClient,
    asking: Asking,
    asks: Sequence[Ask],
    due_s: Sequence[float],
    at_most: int | None = None,
    on_record: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Sends each of ``asks`` at its second of ``due_s`` after the start, whether others have ended or not.

    ``at_most`` bounds those under way; who waits for that, or is sent late, still counts from when it was due: a
    stalled server cannot hide the requests that it kept from being sent (coordinated omission).
    """
    records: list[Record] = []
    start = time.perf_counter()
    places = asyncio.Semaphore(at_most if at_most is not None else max(1, len(asks)))

    async def one_request(ask: Ask, due: float) -> None:
        async with places:
            record = await send(client, asking, ask, due)
        records.append(record)
        on_record(record)

    async with asyncio.TaskGroup() as requests:
        for ask, after_s in zip(asks, due_s, strict=True):
            await asyncio.sleep(max(0.0, start + after_s - time.perf_counter()))
            requests.create_task(one_request(ask, start + after_s))
    return records
