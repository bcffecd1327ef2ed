"""Every HTTP request: its id, its line in the log, its count, and none new once the server is to stop."""

import logging
from time import perf_counter

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltaserve.delta_store.errors import ShuttingDown
from deltaserve.server.api import errors
from deltaserve.server.draining import Draining
from deltaserve.server.logs import id_for, request_id
from deltaserve.server.metrics import Metrics

ALWAYS = ("/health", "/ready", "/metrics")
"""Asked all the time by machines: answered while the server stops, and logged at level debug."""

METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))

log = logging.getLogger("deltaserve.access")


class Traffic:
    """ASGI middleware, the outermost. ``request.state`` has ``request_id`` and ``arrived``, on ``perf_counter``.

    What a route leaves in ``request.state.noted`` stands in the log's line too.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, draining: Draining) -> None:
        self._app, self._metrics, self._draining = app, metrics, draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request = Request(scope)
        identity = id_for(request.headers.get("x-request-id"))
        request_id.set(identity)
        request.state.request_id, request.state.arrived = identity, perf_counter()
        request.state.noted, request.state.error_code = {}, None
        status = 500  # of what fails before it has begun to answer

        async def named_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = identity
            await send(message)

        try:
            if scope["path"] in ALWAYS:
                await self._app(scope, receive, named_send)
            else:
                await self._answer(request, receive, named_send)
        finally:
            self._note(request, status)

    async def _answer(self, request: Request, receive: Receive, send: Send) -> None:
        if self._draining.begun:
            error = ShuttingDown("The server is being stopped and takes no new requests; ask another one, or later")
            answer = await errors.answer_known(request, error)
            answer.headers["connection"] = "close"
            return await answer(request.scope, receive, send)
        with self._draining.counted():
            await self._app(request.scope, receive, send)

    def _note(self, request: Request, status: int) -> None:
        seconds = perf_counter() - request.state.arrived
        method = request.method if request.method in METHODS else "OTHER"
        handler = getattr(request.scope.get("route"), "path", "unmatched")
        self._metrics.http.labels(method, handler, str(status)).inc()
        self._metrics.http_seconds.labels(method, handler).observe(seconds)
        if request.state.error_code is not None:
            self._metrics.refused.labels(request.state.error_code).inc()
        level = logging.DEBUG if request.scope["path"] in ALWAYS else logging.INFO
        if log.isEnabledFor(level):
            key = getattr(request.state, "key", None)
            fields = {
                "method": method,
                "path": request.scope["path"],
                "status": status,
                "duration_ms": round(1000 * seconds, 1),
                "client": request.client.host if request.client else None,
                "key": key.id if key is not None else None,
                "error_code": request.state.error_code,
                **request.state.noted,
            }
            log.log(level, "%s %r %d in %.0f ms", method, request.scope["path"], status, 1000 * seconds, extra=fields)
