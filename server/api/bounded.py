"""Routes whose JSON bodies have a largest size, counted as they arrive."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message, Receive

MAX_BODY_BYTES = 16 * 2**20


class BoundedRoute(APIRoute):
    """A route that answers 413 as soon as its body is known to be too large."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await answer(Request(request.scope, counted(request.receive)))

        return bounded


def counted(receive: Receive) -> Receive:
    """``receive`` that raises HTTPException once more than ``MAX_BODY_BYTES`` have come."""
    received = 0

    async def counting() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise HTTPException(413, f"The body is larger than {MAX_BODY_BYTES} bytes; send less")
        return message

    return counting
