"""Bodies streamed to disk: counted, timed and hashed as they arrive, never held in memory."""

import asyncio
import base64
import binascii
import errno
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from deltaserve.delta_store.blobs import DIGEST, HashingFile
from deltaserve.delta_store.errors import StorageFull, UploadError, UploadIncomplete, UploadTooLarge
from deltaserve.server.api.multipart import Multipart

PIECE_BYTES = 2**20
"""Bytes gathered before they are hashed and written, off the event loop."""


async def receive_file(request: Request, path: Path, max_bytes: int) -> str:
    """Write the body to ``path``; returns its SHA-256, checked against the one that the request announces, if any.

    Raises UploadTooLarge as soon as ``max_bytes`` is passed, UploadIncomplete if the body is not what was announced.
    """
    announced = announced_digest(request)
    with disk_room(), HashingFile(path) as file:
        async for piece in pieces(request, max_bytes):
            await run_in_threadpool(file.write, piece)
    if announced and announced != file.digest:
        raise UploadIncomplete(f"The body's SHA-256 is {file.digest}, {announced} was announced; send it again")
    return file.digest


async def receive_form(request: Request, form: Multipart, max_bytes: int) -> None:
    """Give a multipart body to ``form``. Raises as ``receive_file`` and the form do."""
    if announced_digest(request):
        raise UploadError("A form's checksum is not checked; send the artifact as the body to PUT /v1/variants/{name}")
    try:
        with disk_room():
            async for piece in pieces(request, max_bytes):
                await run_in_threadpool(form.write, piece)
            form.close()
    finally:
        form.discard()


@contextmanager
def disk_room() -> Iterator[None]:
    """A full disk is a StorageFull."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StorageFull(f"The server's disk is full ({error.strerror}); ask whoever runs it to make room") from error


async def pieces(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """The body in pieces of about PIECE_BYTES, at most ``max_bytes`` of it."""
    for header in ("Content-Encoding", "Content-Range"):
        if header in request.headers:
            raise UploadError(f"{header}: {request.headers[header]!r} is not supported; send the whole file as it is")
    length = request.headers.get("content-length")
    if length and int(length) > max_bytes:
        raise _too_large(request, length, max_bytes)
    received, gathered = 0, bytearray()
    async for chunk in _chunks(request):
        received += len(chunk)
        if received > max_bytes:
            raise _too_large(request, f"more than {max_bytes}", max_bytes)
        gathered += chunk
        if len(gathered) >= PIECE_BYTES:
            yield bytes(gathered)
            gathered.clear()
    if length and int(length) != received:
        raise UploadIncomplete(f"Content-Length says {length} bytes, {received} came; send it again")
    yield bytes(gathered)


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes; a pause longer than the setting ends it."""
    stream = request.stream()
    seconds = request.app.state.settings.upload_idle_seconds
    while True:
        try:
            async with asyncio.timeout(seconds):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except ClientDisconnect as error:
            raise UploadIncomplete("The connection was closed before the body's end; send it again") from error
        except TimeoutError as error:
            raise UploadIncomplete(f"Nothing came for {seconds:g} s before the body's end; send it again") from error
        yield chunk


def announced_digest(request: Request) -> str | None:
    """The SHA-256 that the request announces for its body, in hex.

    One of: the query's ``digest=<hex>``, or a header ``X-Checksum-Sha256: <hex>`` or
    ``Repr-Digest: sha-256=:<base64>:`` (RFC 9530). Raises UploadError if malformed, or if several differ.
    """
    given = {
        "digest": request.query_params.get("digest"),
        "X-Checksum-Sha256": request.headers.get("x-checksum-sha256"),
        "Repr-Digest": request.headers.get("repr-digest"),
    }
    digests = {_parsed(where, value) for where, value in given.items() if value is not None}
    if len(digests) > 1:
        raise UploadError(f"The request announces different checksums: {', '.join(sorted(digests))}")
    return next(iter(digests), None)


def _parsed(where: str, value: str) -> str:
    digest = value.strip().lower().removeprefix("sha256:")
    if where == "Repr-Digest" and (match := re.search(r"\bsha-256=:([A-Za-z0-9+/=]*):", value)):
        with suppress(binascii.Error):
            digest = base64.b64decode(match[1], validate=True).hex()
    if not DIGEST.fullmatch(digest):
        raise UploadError(
            f"{where} = {value!r} is not a SHA-256: send 64 hex digits, or sha-256=:<base64>: in Repr-Digest"
        )
    return digest


def _too_large(request: Request, amount: str, max_bytes: int) -> UploadTooLarge:
    is_set = max_bytes == request.app.state.settings.max_upload_bytes
    setting = " (DELTASERVE_MAX_UPLOAD_BYTES)" if is_set else ""
    return UploadTooLarge(f"The upload has {amount} bytes; at most {max_bytes} are taken{setting}")
