"""What is logged: a line a record on stderr, as text or JSON, with the id of the request that it is about."""

import logging
import logging.config
import re
import sys
from contextvars import ContextVar
from typing import TextIO
from uuid import uuid4

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request that is being answered, empty outside of any."""

GIVEN_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
"""What a client's own id may look like; another is replaced, for it goes into logs and headers as it is."""

QUIET = ("httpx", "httpcore", "python_multipart", "opentelemetry.attributes")
"""Libraries that say at level info what concerns nobody who runs a server."""


def id_for(given: str | None) -> str:
    """The client's own request id where it is a sane one, else a fresh one."""
    return given if given and GIVEN_ID.fullmatch(given) else uuid4().hex


def configure(level: str, log_format: str) -> None:
    """Log from ``level`` on, as ``text`` or ``json``; replaces what was configured before."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {"request": {"()": RequestFilter}},
            "formatters": {
                "text": {"format": "%(levelname)s: %(message)s%(about)s"},
                "json": {
                    "()": "pythonjsonlogger.json.JsonFormatter",
                    "format": "%(levelname)s %(name)s %(message)s",
                    "rename_fields": {"levelname": "level", "name": "logger"},
                    "timestamp": "time",
                    "reserved_attrs": [*_RESERVED, "about", "color_message"],
                },
            },
            "handlers": {
                "stderr": {"()": StderrHandler, "formatter": log_format, "filters": ["request"]},
            },
            "root": {"level": level.upper(), "handlers": ["stderr"]},
            "loggers": {name: {"level": max(logging.WARNING, _number(level))} for name in QUIET},
        }
    )


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is when a record comes: who replaced it may have closed the one before."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class RequestFilter(logging.Filter):
    """Lets everything through, with ``request_id`` where a request is being answered."""

    def filter(self, record: logging.LogRecord) -> bool:
        found = request_id.get()
        if found:
            record.request_id = found
        record.about = f" [{found}]" if found else ""
        return True


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


_RESERVED = (*vars(logging.makeLogRecord({})), "message", "asctime")
