"""The command line's way to a running server: its errors are DeltaServeErrors, one line each."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer

from deltaserve.delta_store.errors import DeltaServeError

Url = Annotated[str, typer.Option(help="Address of the server, with or without /v1.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "DELTASERVE_API_KEY"
TIMEOUT = httpx.Timeout(30, read=600, write=600)


class Refusal(DeltaServeError):
    """What the server said in its own words; ``code`` is the error's, as docs/api.md lists them."""

    def __init__(self, message: str, code: str | None) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def connected(url: str) -> Iterator[httpx.Client]:
    """A client of the server at ``url``, with the key in DELTASERVE_API_KEY if there is one.

    What fails on the way becomes a DeltaServeError.
    """
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), timeout=TIMEOUT, headers=headers) as client:
            yield client
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DeltaServeError(f"No answer from {url} ({error}); is `deltaserve serve` running there?") from error


def answer(response: httpx.Response) -> Any:
    """The body of a response as JSON; raises a Refusal if it is an error."""
    try:
        body = response.json()
        refusal = Refusal(body["error"]["message"], body["error"]["code"]) if response.is_error else None
    except (ValueError, KeyError, TypeError) as error:
        raise DeltaServeError(f"{response.url} is no deltaserve: it answered {response.status_code}") from error
    if refusal:
        raise refusal
    return body


def variant_path(name: str) -> str:
    """The path of a variant's resource."""
    return f"/v1/variants/{quote(name)}"
