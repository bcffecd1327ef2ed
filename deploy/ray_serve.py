"""deltaserve on Ray Serve: replicas of the whole server, and a router that sends a variant where it is loaded.

    serve run deploy.ray_serve:app base=./SmolLM2-135M-Instruct store=./store replicas=2

All arguments but ``replicas`` (a number, or ``least-most`` for autoscaling by requests under way) and ``per_replica``
are settings of ``deltaserve serve``. Replicas share a registry and blobs: a folder on one machine, Redis and an object
store on several.

A replica is an ordinary server on a port of its own; the router passes HTTP through, body and stream untouched. Which
replica, Ray decides: a request *leases* one by its model's name as multiplexed model id, so that requests of a variant
go where it is resident as long as there is room, and holds the lease until its answer has ended, so that Ray counts it.
"""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

PER_REPLICA = 64
"""Requests that one replica answers at a time, unless told."""
LARGEST_QUERY_BYTES = 16 << 20
"""Of a JSON body, which is read whole to learn its model; larger ones go to any replica, as uploads do."""
ATTEMPTS = 3
"""Replicas that are tried before a request fails, as long as nothing of an answer has come."""
PATIENCE_SECONDS = 120.0
"""For a replica to begin its answer; a cold variant is loaded in this time."""
NOT_PASSED_ON = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "host", "content-length"}

log = logging.getLogger("ray.serve")
router_app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


@serve.deployment(graceful_shutdown_timeout_s=10)
class Replica:
    """A deltaserve server in this actor's own event loop, on a free port of its node."""

    async def __init__(self, settings: Mapping[str, str]) -> None:
        import uvicorn

        from deltaserve.server.app import create_app
        from deltaserve.server.commands.serve import bound
        from deltaserve.server.settings import load

        app = await asyncio.to_thread(lambda: create_app(load(settings)))
        listener = bound(host := ray.util.get_node_ip_address(), 0)
        self.address = f"{host}:{listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, http="h11", log_level="warning"))
        self.serving = asyncio.create_task(self.server.serve(sockets=[listener]))
        while not self.server.started:
            if self.serving.done():
                raise RuntimeError("The server did not start") from self.serving.exception()
            await asyncio.sleep(0.05)

    @serve.multiplexed(max_num_models_per_replica=PER_REPLICA)  # type: ignore[untyped-decorator]
    async def model(self, name: str) -> str:
        """Tells Ray that this replica has the variant; the server loads it when the request itself comes."""
        return name

    async def lease(self) -> AsyncIterator[str]:
        """This replica's address and process, and then nothing until whoever asked goes away."""
        if name := serve.get_multiplexed_model_id():
            await self.model(name)
        yield f"{self.address} {os.getpid()}"
        await asyncio.Event().wait()

    async def check_health(self) -> None:
        if self.serving.done():
            raise RuntimeError("The server has ended")

    async def __del__(self) -> None:
        self.server.should_exit = True
        await self.serving


# serve.ingress copies the routes when it decorates, so what they call stands before it


async def _body(answer: httpx.Response, lease: DeploymentResponseGenerator) -> AsyncIterator[bytes]:
    """The answer's bytes as they come. A replica that dies meanwhile ends a stream with an error event."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    except httpx.TransportError as error:
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            raise  # the connection breaks off, as the length that was promised did not come
        log.warning("A replica died in the middle of a stream: %r", error)
        yield b"data: " + json.dumps(_error("The replica that answered is gone; ask again")).encode() + b"\n\n"
    finally:
        lease.cancel()
        await answer.aclose()


def _is_query(request: Request) -> bool:
    """A JSON body, small enough to be read whole."""
    is_json = request.headers.get("content-type", "").startswith("application/json")
    return is_json and int(request.headers.get("content-length", LARGEST_QUERY_BYTES + 1)) <= LARGEST_QUERY_BYTES


def _model(query: bytes | None) -> str:
    """The name under ``model``; empty where there is none, or what is no JSON: the replica says so better."""
    try:
        model = json.loads(query or b"{}").get("model", "")
    except (ValueError, AttributeError):
        return ""
    return model if isinstance(model, str) else ""


def _passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in NOT_PASSED_ON}


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": "replica_unavailable"}}


@serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
@serve.ingress(router_app)
class Router:
    """Passes requests to replicas, several times if one dies before it answers."""

    def __init__(self, replicas: DeploymentHandle, base: str) -> None:
        self.base = base
        self.replicas = replicas.options(stream=True, method_name="lease")
        self.client = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=10.0), limits=httpx.Limits())

    @router_app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"])
    async def pass_on(self, request: Request) -> Response:
        query = await request.body() if _is_query(request) else None
        model = _model(query)
        variant = "" if model == self.base else model  # every replica has the base
        for _ in range(ATTEMPTS if query is not None or request.method == "GET" else 1):
            lease = self.replicas.options(multiplexed_model_id=variant).remote()
            try:
                replica = await anext(lease)
                answer = await self._begin(request, query, f"http://{replica.split()[0]}")
            except (httpx.TransportError, RayServeException, ray.exceptions.RayError) as error:
                lease.cancel()
                log.warning("A replica did not answer: %r", error)
                continue
            except BaseException:
                lease.cancel()
                raise
            headers = _passed_on(answer.headers) | {"x-deltaserve-replica": replica}
            return StreamingResponse(_body(answer, lease), answer.status_code, headers)
        return JSONResponse(_error("No replica could answer; try again later"), 503, {"retry-after": "1"})

    async def _begin(self, request: Request, query: bytes | None, address: str) -> httpx.Response:
        url = f"{address}{request.url.path}" + (f"?{request.url.query}" if request.url.query else "")
        headers = _passed_on(request.headers)
        if query is None and (length := request.headers.get("content-length")):
            headers["content-length"] = length  # so that an upload too large is refused before it is sent
        content = query if query is not None else request.stream()
        passed = self.client.build_request(request.method, url, headers=headers, content=content)
        return await asyncio.wait_for(self.client.send(passed, stream=True), PATIENCE_SECONDS)


def app(arguments: dict[str, str]) -> serve.Application:
    """The application that ``serve run`` starts; refuses an unknown setting by name before anything starts."""
    from deltaserve.server.settings import load

    settings = dict(arguments)
    least, _, most = settings.pop("replicas", "1").partition("-")
    at_once = int(settings.pop("per_replica", PER_REPLICA))
    base = load(settings).base_name
    size: dict[str, Any] = {"num_replicas": int(least)}
    if most:
        scaling = {"min_replicas": int(least), "max_replicas": int(most), "target_ongoing_requests": at_once / 2}
        size = {"autoscaling_config": scaling}
    replicas = Replica.options(max_ongoing_requests=at_once, **size).bind(settings)
    return Router.bind(replicas, base)
