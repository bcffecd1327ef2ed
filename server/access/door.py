"""At the door of the application: whose key came with a request, and whether its role allows the route.

What no table below names needs an admin's key, so that a new route is closed until somebody opens it.
"""

import ipaddress
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from deltaserve.delta_store.errors import DeltaServeError, KeyRefused, NotPermitted, OptionError
from deltaserve.server.access.keys import Key, KeyStore
from deltaserve.server.api import errors

if TYPE_CHECKING:
    from deltaserve.server.settings import Settings

PUBLIC = ("/health", "/ready", "/docs", "/openapi.json", "/console")
"""Open to everybody, with all that is below them: they tell nothing of variants or tenants (the console is files)."""

INFER = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/classify"),
    ("POST", "/classify"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/models"),
    ("GET", "/v1/usage"),
    ("GET", "/v1/console"),
)
"""What a key of role infer may do, with all that is below."""


class Door:
    """ASGI middleware. The key of whoever asks is ``request.state.key``, None where keys are off."""

    def __init__(self, app: ASGIApp, keys: KeyStore, settings: "Settings") -> None:
        self._app, self._keys, self._settings = app, keys, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request = Request(scope)
        try:
            request.state.key = self._admitted(request)
        except DeltaServeError as error:
            answer = await errors.answer_known(request, error)
            return await answer(scope, receive, send)
        await self._app(scope, receive, send)

    def _admitted(self, request: Request) -> Key | None:
        path, method = request.scope["path"], request.method
        is_open = PUBLIC + (("/metrics",) if self._settings.metrics_public else ())
        if any(_is_below(path, public) for public in is_open) or not keys_required(self._settings, self._keys):
            return None
        key = _key(self._keys, request.headers.get("authorization"))
        reads = "GET" if method == "HEAD" else method
        if key.role != "admin" and not any(reads == allowed and _is_below(path, at) for allowed, at in INFER):
            raise NotPermitted(
                f"{method} {path} needs a key of role admin; this one ({key.name!r}, {key.id}) has role {key.role}"
            )
        return key


def keys_required(settings: "Settings", keys: KeyStore) -> bool:
    """Whether requests need a key now."""
    return settings.keys == "required" or (settings.keys == "auto" and keys.exist())


def check_start(settings: "Settings", keys: KeyStore) -> None:
    """Raise OptionError where a server without keys would listen on an address that others reach."""
    if settings.keys == "auto" and not keys.exist() and not is_loopback(settings.host):
        raise OptionError(
            f"Without API keys, whoever reaches {settings.host} could use and change the models. Make a key with "
            f"`deltaserve keys create --role admin --name NAME --store {settings.store}`, or listen on 127.0.0.1, or "
            "set DELTASERVE_KEYS=off"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}/")


def _key(keys: KeyStore, header: str | None) -> Key:
    challenge = {"www-authenticate": "Bearer"}
    scheme, _, text = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not text.strip():
        raise KeyRefused("This server needs an API key: send 'Authorization: Bearer KEY'", headers=challenge)
    key = keys.find(text.strip())
    if key is None:
        raise KeyRefused(f"The API key {_masked(text.strip())} is unknown or revoked", headers=challenge)
    return key


def _masked(text: str) -> str:
    """Enough of a wrong key to recognise it, too little to guess it."""
    return f"'{text[:6]}...{text[-2:]}'" if len(text) > 16 and text.isascii() and text.isprintable() else "sent"
