"""``/console``: the page's files as they are, with headers that keep everything foreign out of it."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
"""Nothing from elsewhere, nothing inline, and no text that becomes markup: names and answers are shown, never run."""

HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asked again each time, answered 304: after an upgrade the files fit each other
}


class Page(StaticFiles):
    """The folder ``static``; ``/console`` leads to ``/console/``, so that the page's addresses can be relative."""

    def __init__(self) -> None:
        super().__init__(directory=Path(__file__).parent / "static", html=True)

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(HEADERS)
        return response


def install(app: FastAPI) -> None:
    """Serve the page; it needs no key, what it shows does."""
    app.mount("/console", Page(), name="console")
