"""``deltaserve serve``: load the base and answer over HTTP. Every setting is a flag."""

import gc
import os
import signal
import socket
import sys
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer

from deltaserve.delta_store.errors import OptionError
from deltaserve.kernels.waiting import wait_awake
from deltaserve.server.settings import Settings, load


def command(**flags: Any) -> None:
    """Serve a base model and its variants: an OpenAI-compatible API with uploads while it runs.

    Each flag can also be a variable: --max-running is DELTASERVE_MAX_RUNNING. A flag goes first.

    Example: `deltaserve serve ./SmolLM2-135M-Instruct --store ./store --port 8000`
    """
    wait_awake()
    settings = load(flags)
    import uvicorn

    from deltaserve.server.api.kinds import is_encoder
    from deltaserve.server.app import create_app
    from deltaserve.server.draining import DrainingServer
    from deltaserve.server.logs import configure

    class Server(DrainingServer):
        """Says how to ask it, once it can be asked."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                gc.collect()
                gc.freeze()  # modules and the model stay to the end: going over them is what a collection would cost
                typer.echo(curl_line(settings, listener.getsockname()[1], encoder=is_encoder(app.state.engine)))

    configure(settings.log_level, settings.log_format)
    with bound(settings.host, settings.port) as listener:
        app = create_app(settings)
        config = uvicorn.Config(
            app,
            http="h11",  # httptools answers a body longer than its Content-Length before the application can
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,  # for what is left once DrainingServer has waited
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit(0))  # uvicorn raises it again once all is shut down
        Server(config, app).run(sockets=[listener])
        if (reason := app.state.engine.ended) is not None:
            typer.echo(f"Error: {reason}", err=True)
            os._exit(1)  # a step that waits for a process that is gone would keep this one


def flag(name: str) -> Parameter:
    """A setting as a parameter of the command. Its value stays text: Settings reads it as it reads the environment."""
    field = Settings.model_fields[name]
    default = "" if field.is_required() or field.default is None else f" Default: {field.default}."
    text = f"{field.description}.{default}"
    option = (
        typer.Argument(help=text, metavar="BASE") if name == "base" else typer.Option(help=text, metavar=name.upper())
    )
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option])


command.__signature__ = Signature([flag(name) for name in Settings.model_fields])  # type: ignore[attr-defined]


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address but does not listen yet: a taken port is known before the base is loaded."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OptionError(
            f"Cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port"
        ) from error
    return listener


def curl_line(settings: Settings, port: int, *, encoder: bool = False) -> str:
    """A command that asks the base."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    asked = '"input": "Hello"' if encoder else '"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 60'
    body = f'{{"model": "{settings.base_name}", {asked}}}'
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    route = "embeddings" if encoder else "chat/completions"
    return f"curl {address}/v1/{route} -H 'Content-Type: application/json' -d '{body}'"
