"""Every failure becomes OpenAI's error object, with the status, type and code that one table gives it."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from deltaserve.delta_store import errors
from deltaserve.server.logs import request_id

RETRY_AFTER_SECONDS = 1
INVALID = "invalid_request_error"
SERVER = "server_error"
UNEXPECTED = "The server failed on this request; its log says why"

# The row of the nearest ancestor counts, so that a new kind of error has its family's status at once.
TABLE: dict[type[errors.DeltaServeError], tuple[int, str, str | None]] = {
    errors.DeltaServeError: (500, SERVER, "internal_error"),
    errors.CheckpointError: (400, INVALID, "unusable_checkpoint"),
    errors.UnsafeCheckpoint: (400, INVALID, "unsafe_checkpoint"),
    errors.MissingTensors: (400, INVALID, "missing_tensors"),
    errors.UnsupportedCheckpoint: (400, INVALID, "unsupported_checkpoint"),
    errors.ArtifactError: (400, INVALID, "unusable_artifact"),
    errors.CorruptArtifact: (400, INVALID, "corrupt_artifact"),
    errors.UnsupportedArtifact: (400, INVALID, "unsupported_artifact"),
    errors.BaseMismatch: (409, INVALID, "base_mismatch"),
    errors.ProfileMissing: (409, INVALID, "profile_missing"),
    errors.OptionError: (400, INVALID, "invalid_value"),
    errors.ToleranceMissed: (400, INVALID, "tolerance_missed"),
    errors.RegistryError: (500, SERVER, "registry_error"),
    errors.VariantNotFound: (404, INVALID, "model_not_found"),
    errors.VersionNotFound: (404, INVALID, "version_not_found"),
    errors.InvalidName: (400, INVALID, "invalid_name"),
    errors.RegistryUnavailable: (503, SERVER, "registry_unavailable"),
    errors.UploadError: (400, INVALID, "upload_refused"),
    errors.UploadTooLarge: (413, INVALID, "upload_too_large"),
    errors.UploadIncomplete: (400, INVALID, "upload_incomplete"),
    errors.UploadClosed: (409, INVALID, "upload_closed"),
    errors.StorageFull: (507, SERVER, "storage_full"),
    errors.FileError: (400, INVALID, "unusable_file"),
    errors.FileNotFound: (404, INVALID, "file_not_found"),
    errors.UploadNotFound: (404, INVALID, "upload_not_found"),
    errors.JobError: (500, SERVER, "job_error"),
    errors.JobNotFound: (404, INVALID, "job_not_found"),
    errors.JobFinished: (409, INVALID, "job_finished"),
    errors.JobFailed: (500, SERVER, "job_failed"),
    errors.AccessError: (403, INVALID, "insufficient_permissions"),
    errors.KeyRefused: (401, INVALID, "invalid_api_key"),
    errors.KeyNotFound: (404, INVALID, "key_not_found"),
    errors.NotPermitted: (403, INVALID, "insufficient_permissions"),
    errors.RequestLimitReached: (429, "requests", "rate_limit_exceeded"),
    errors.TokenLimitReached: (429, "tokens", "rate_limit_exceeded"),
    errors.EngineError: (500, SERVER, "engine_error"),
    errors.RequestRefused: (400, INVALID, "invalid_value"),
    errors.ContextTooLong: (400, INVALID, "context_length_exceeded"),
    errors.QueueFull: (429, "rate_limit_error", "queue_full"),
    errors.WaitedTooLong: (429, "rate_limit_error", "queue_full"),
    errors.GenerationFailed: (500, SERVER, "generation_failed"),
    errors.EngineDown: (503, SERVER, "engine_down"),
    errors.ShuttingDown: (503, SERVER, "shutting_down"),
}

PARAMS = {errors.VariantNotFound: "model", errors.InvalidName: "name"}
"""Which field a failure is about, where that is always the same one."""

VALIDATION_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "not_there_yet": "unsupported_parameter",
    "json_invalid": "invalid_json",
}
VALIDATION_MESSAGES = {
    "missing": "is required",
    "extra_forbidden": "is not a field that deltaserve knows; leave it out",
}
SUBJECT = re.compile("^[A-Z][a-z]+ (?=should )")
"""pydantic begins "Input should be ...", "List should have ..."; the field's name takes that place."""

HTTP_CODES = {400: "invalid_json", 404: "unknown_url", 405: "method_not_allowed", 413: "body_too_large"}

log = logging.getLogger(__name__)


def install(app: FastAPI) -> None:
    """Have ``app`` answer every failure in OpenAI's shape."""
    app.add_exception_handler(errors.DeltaServeError, answer_known)
    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(Exception, answer_unexpected)


def body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def described(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of any failure. One that nobody foresaw is logged, and its text stays here."""
    if not isinstance(error, errors.DeltaServeError):
        log.error("Unexpected failure while answering a request", exc_info=error)
        return 500, body(UNEXPECTED, SERVER, "internal_error")
    status, kind, code = next(TABLE[ancestor] for ancestor in type(error).__mro__ if ancestor in TABLE)
    param = next((name for family, name in PARAMS.items() if isinstance(error, family)), None)
    return status, body(str(error), kind, code, param or getattr(error, "param", None))


def answer(
    request: Request, status: int, content: dict[str, Any], headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The answer to a request that failed; its code goes to the log and the metrics too."""
    request.state.error_code = content["error"]["code"]
    return JSONResponse(content, status, headers)


async def answer_known(request: Request, error: Exception) -> Response:
    """A failure of our own error tree."""
    status, content = described(error)
    headers = {"retry-after": str(RETRY_AFTER_SECONDS)} if status in (429, 503) else {}
    return answer(request, status, content, headers | getattr(error, "headers", {}))


async def answer_invalid(request: Request, error: Exception) -> Response:
    """A body, query or path that does not fit its schema: the first complaint, as a 400."""
    if not isinstance(error, RequestValidationError):
        raise error
    complaint = error.errors()[0]
    kind, param = complaint["type"], field_name(complaint["loc"])
    if kind == "json_invalid":
        reason = complaint["ctx"]["error"]
        return answer(request, 400, body(f"The body is not valid JSON: {reason}", INVALID, VALIDATION_CODES[kind]))
    if param is None:
        message = "The body must be a JSON object whose names are text, sent with 'Content-Type: application/json'"
        return answer(request, 400, body(message, INVALID, "invalid_body"))
    said = VALIDATION_MESSAGES.get(kind) or SUBJECT.sub("", complaint["msg"])
    message = f"{param!r} {said}"
    return answer(request, 400, body(message, INVALID, VALIDATION_CODES.get(kind, "invalid_value"), param))


def field_name(location: tuple[int | str, ...]) -> str | None:
    """``messages[0].content`` for ``("body", "messages", 0, "content")``; None for the body itself."""
    name = ""
    for step in location[1:]:
        name += f"[{step}]" if isinstance(step, int) else f".{step}"
    return name.removeprefix(".") or None


async def answer_http(request: Request, error: Exception) -> Response:
    """A route that is not there, a method that it does not have, a body that is no JSON at all."""
    if not isinstance(error, HTTPException):
        raise error
    status = error.status_code
    message = f"{error.detail}: {request.method} {request.url.path}"
    kind = INVALID if status < 500 else SERVER
    return answer(request, status, body(message, kind, HTTP_CODES.get(status)), error.headers)


async def answer_unexpected(request: Request, error: Exception) -> Response:
    """A failure that nobody foresaw; the ASGI server logs its trace."""
    return answer(request, 500, body(UNEXPECTED, SERVER, "internal_error"), {"x-request-id": request_id.get()})
