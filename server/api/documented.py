"""What OpenAPI is told of a route where its annotations cannot say it: a body that is a file, an answer of events."""

from typing import Any

_TEXT_EVENTS = {"schema": {"type": "string", "description": "Events, `data: {...}`; the last one is `data: [DONE]`"}}
_FILE = {"schema": {"type": "string", "format": "binary"}}

EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": _TEXT_EVENTS}}}
"""``responses`` of a route that streams if it is asked to."""

FILE_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/octet-stream": _FILE}}}
"""``openapi_extra`` of a route that takes a file as its body."""

FILE: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": _FILE}}}
"""``responses`` of a route that answers with a file."""

TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
"""``responses`` of a route that answers with plain text, its errors with JSON as all others."""
