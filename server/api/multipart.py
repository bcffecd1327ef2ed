"""Multipart bodies, written to disk part by part as they arrive; the parser is python-multipart's.

Its ready-made readers keep fields in memory and files in the system's temporary folder, without bounds; this one writes
where it is told, is told which parts may come, and refuses the first that may not.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from deltaserve.delta_store.blobs import HashingFile
from deltaserve.delta_store.errors import UploadError, UploadIncomplete, UploadTooLarge

MAX_FIELD_BYTES = 1024
MAX_BOUNDARY_BYTES = 70  # RFC 2046; headers of parts are bounded by the parser


@dataclass(frozen=True, slots=True)
class ReceivedFile:
    """A file of a form: where it lies now, how its sender called it, and what was counted while it came."""

    path: Path
    filename: str
    size_bytes: int
    sha256: str


@dataclass(slots=True)
class _Part:
    """The part that is being read: a file, or a field of text."""

    name: str = ""
    filename: str = ""
    headers: dict[bytes, bytes] = field(default_factory=dict)
    header: list[bytes] = field(default_factory=lambda: [b"", b""])
    path: Path | None = None
    file: HashingFile | None = None


class Multipart:
    """Give it the body with ``write``, in pieces of any size, then ``close`` it: ``fields`` and ``files`` are there.

    ``place(part, filename)`` says where a part's file goes; None: it is a field of text. It raises UploadError for what
    may not come; ``expected`` says in words what may. Raises UploadError, or one of its kinds, at the first thing that
    is wrong.
    """

    def __init__(
        self, content_type: str, max_parts: int, expected: str, place: Callable[[str, str], Path | None]
    ) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not 1 <= len(boundary) <= MAX_BOUNDARY_BYTES:
            raise UploadError(
                f"Send multipart/form-data, with a boundary of 1 to {MAX_BOUNDARY_BYTES} bytes, that has {expected}"
            )
        self.fields: dict[str, str] = {}
        self.files: list[ReceivedFile] = []
        self._max_parts, self._expected, self._place = max_parts, expected, place
        self._parts, self._complete = 0, False
        self._part = _Part()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._add_header(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._add_header(1, data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._open,
                "on_part_data": lambda data, start, end: self._add(data[start:end]),
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def write(self, data: bytes) -> None:
        """The next piece of the body."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise UploadError(f"The body is not the multipart form that its header says: {error}") from error

    def close(self) -> None:
        """The body has ended: is it whole?"""
        if not self._complete:
            raise UploadIncomplete("The form ended early: its closing boundary is missing; send it again")

    def discard(self) -> None:
        """Close what a form that failed left open."""
        if self._part.file:
            self._part.file.close()

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > self._max_parts:
            raise UploadTooLarge(f"The form has more than {self._max_parts} parts; send only {self._expected}")
        self._part = _Part()

    def _add_header(self, side: int, data: bytes) -> None:
        self._part.header[side] += data

    def _end_header(self) -> None:
        name, value = self._part.header
        self._part.headers[name.lower()] = value.strip()
        self._part.header = [b"", b""]

    def _open(self) -> None:
        _, options = parse_options_header(self._part.headers.get(b"content-disposition", b""))
        part = self._part
        part.name = options.get(b"name", b"").decode(errors="replace")
        part.filename = options.get(b"filename", b"").decode(errors="replace")
        encoding = part.headers.get(b"content-transfer-encoding", b"binary").lower()
        if encoding not in (b"binary", b"8bit", b"7bit"):
            raise UploadError(
                f"Part {part.name!r} is encoded as {encoding.decode(errors='replace')!r}; send it as it is"
            )
        part.path = self._place(part.name, part.filename)
        if part.path is None and not self.fields.get(part.name):
            self.fields[part.name] = ""
            return
        try:
            if part.path is None:
                raise FileExistsError
            part.file = HashingFile(part.path)
        except FileExistsError as error:
            raise UploadError(f"Part {part.name!r} (file {part.filename!r}) came twice") from error

    def _add(self, data: bytes) -> None:
        name = self._part.name
        if self._part.file:
            self._part.file.write(data)
        elif len(self.fields[name]) + len(data) > MAX_FIELD_BYTES:
            raise UploadTooLarge(f"Part {name!r} has more than {MAX_FIELD_BYTES} bytes")
        else:
            self.fields[name] += data.decode(errors="replace")

    def _end_part(self) -> None:
        part = self._part
        if part.file and part.path:
            part.file.close()
            self.files.append(ReceivedFile(part.path, part.filename, part.file.size_bytes, part.file.digest))

    def _end(self) -> None:
        self._complete = True
