"""What OpenAPI is told of a route where its annotations cannot say it: files, forms, event streams."""

from collections.abc import Sequence
from typing import Any

_TEXT_EVENTS = {"schema": {"type": "string", "description": "Events, `data: {...}`; the last one is `data: [DONE]`"}}
BINARY = {"type": "string", "format": "binary"}
"""The schema of a file."""

_FILE = {"schema": BINARY}

EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": _TEXT_EVENTS}}}
"""``responses`` of a route that streams if it is asked to."""

FILE_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/octet-stream": _FILE}}}
"""``openapi_extra`` of a route that takes a file as its body."""

FILE: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": _FILE}}}
"""``responses`` of a route that answers with a file."""

TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
"""``responses`` of a route that answers with plain text, its errors with JSON as all others."""


def form(required: Sequence[str], **properties: Any) -> dict[str, Any]:
    """``openapi_extra`` of a route that takes a multipart form with these parts."""
    schema = {"type": "object", "required": list(required), "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
