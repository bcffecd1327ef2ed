"""Multipart uploads, written to disk part by part as they arrive; the parser is python-multipart's.

Its ready-made readers keep fields in memory and files in the system's temporary folder, without bounds; this one writes
where it is told, knows which parts may come, and refuses the first that may not.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from deltaserve.delta_store.errors import UploadError, UploadIncomplete, UploadTooLarge
from deltaserve.delta_store.variant_files import VARIANT_FILES

MAX_NAME_BYTES = 1024
MAX_BOUNDARY_BYTES = 70  # RFC 2046; headers of parts are bounded by the parser
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Each must come; VARIANT_FILES may."""

_EXPECTED = f"'name', and 'artifact' (a file) or 'adapter' (the files {' and '.join(ADAPTER_FILES)})"


@dataclass(slots=True)
class _Part:
    """The part that is being read: a file, or the field ``name``."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    header: list[bytes] = field(default_factory=lambda: [b"", b""])
    file: BinaryIO | None = None


class Form:
    """Give it the body with ``write``, in pieces of any size, then ``close`` it: ``name`` and one of the paths are set.

    ``artifact`` is the file of that part; ``adapter`` is a folder with ADAPTER_FILES. Both are in ``folder``.
    Raises UploadError, or one of its kinds, at the first thing that is wrong.
    """

    def __init__(self, content_type: str, folder: Path, max_parts: int) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not 1 <= len(boundary) <= MAX_BOUNDARY_BYTES:
            raise UploadError(
                f"Send multipart/form-data, with a boundary of 1 to {MAX_BOUNDARY_BYTES} bytes, that has {_EXPECTED}; "
                "an artifact alone goes as the body to PUT /v1/variants/{name}"
            )
        self.name = ""
        self.artifact: Path | None = None
        self.adapter: Path | None = None
        self._folder, self._max_parts = folder, max_parts
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
        """The body has ended: is everything there?"""
        if not self._complete:
            raise UploadIncomplete("The form ended early: its closing boundary is missing; send it again")
        if not self.name or (self.artifact is None) == (self.adapter is None):
            raise UploadError(f"A form has {_EXPECTED}")
        for name in ADAPTER_FILES if self.adapter else ():
            if not (self._folder / "adapter" / name).exists():
                raise UploadError(f"The adapter's {name} is missing; send {' and '.join(ADAPTER_FILES)}")

    def discard(self) -> None:
        """Close what a form that failed left open."""
        if self._part.file:
            self._part.file.close()

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > self._max_parts:
            raise UploadTooLarge(f"The form has more than {self._max_parts} parts; send only {_EXPECTED}")
        self._part = _Part()

    def _add_header(self, side: int, data: bytes) -> None:
        self._part.header[side] += data

    def _end_header(self) -> None:
        name, value = self._part.header
        self._part.headers[name.lower()] = value.strip()
        self._part.header = [b"", b""]

    def _open(self) -> None:
        _, options = parse_options_header(self._part.headers.get(b"content-disposition", b""))
        part = options.get(b"name", b"").decode(errors="replace")
        filename = options.get(b"filename", b"").decode(errors="replace")
        encoding = self._part.headers.get(b"content-transfer-encoding", b"binary").lower()
        if encoding not in (b"binary", b"8bit", b"7bit"):
            raise UploadError(f"Part {part!r} is encoded as {encoding.decode(errors='replace')!r}; send it as it is")
        if part == "name" and not self.name:
            return
        try:
            self._part.file = self._place(part, filename).open("xb")
        except FileExistsError as error:
            raise UploadError(f"Part {part!r} (file {filename!r}) came twice") from error

    def _place(self, part: str, filename: str) -> Path:
        if part == "artifact":
            self.artifact = self._folder / "artifact"
            return self.artifact
        if part == "adapter" and filename in (*ADAPTER_FILES, *VARIANT_FILES):
            self.adapter = self._folder / "adapter"
            self.adapter.mkdir(exist_ok=True)
            return self.adapter / filename
        raise UploadError(f"Part {part!r} (file {filename!r}) is not expected here; a form has {_EXPECTED}")

    def _add(self, data: bytes) -> None:
        if self._part.file:
            self._part.file.write(data)
        elif len(self.name) + len(data) > MAX_NAME_BYTES:
            raise UploadTooLarge(f"Part 'name' has more than {MAX_NAME_BYTES} bytes")
        else:
            self.name += data.decode(errors="replace")

    def _end_part(self) -> None:
        if self._part.file:
            self._part.file.close()

    def _end(self) -> None:
        self._complete = True
