"""The form of ``POST /v1/variants``: a name, and an artifact or the files of a LoRA adapter."""

from pathlib import Path

from deltaserve.delta_store.errors import UploadError
from deltaserve.delta_store.variant_files import VARIANT_FILES
from deltaserve.server.api.multipart import Multipart
from deltaserve.server.files.contents import ADAPTER_FILES

_EXPECTED = f"'name', and 'artifact' (a file) or 'adapter' (the files {' and '.join(ADAPTER_FILES)})"


class Form(Multipart):
    """``name`` and one of the paths are set once it is closed.

    ``artifact`` is the file of that part; ``adapter`` is a folder with ADAPTER_FILES. Both are in ``folder``.
    """

    def __init__(self, content_type: str, folder: Path, max_parts: int) -> None:
        self.artifact: Path | None = None
        self.adapter: Path | None = None
        self._folder = folder
        super().__init__(content_type, max_parts, _EXPECTED, self._placed)

    @property
    def name(self) -> str:
        return self.fields.get("name", "")

    def close(self) -> None:
        """The body has ended: is everything there?"""
        super().close()
        if not self.name or (self.artifact is None) == (self.adapter is None):
            raise UploadError(f"A form has {_EXPECTED}")
        for name in ADAPTER_FILES if self.adapter else ():
            if not (self._folder / "adapter" / name).exists():
                raise UploadError(f"The adapter's {name} is missing; send {' and '.join(ADAPTER_FILES)}")

    def _placed(self, part: str, filename: str) -> Path | None:
        if part == "name":
            return None
        if part == "artifact":
            self.artifact = self._folder / "artifact"
            return self.artifact
        if part == "adapter" and filename in (*ADAPTER_FILES, *VARIANT_FILES):
            self.adapter = self._folder / "adapter"
            self.adapter.mkdir(exist_ok=True)
            return self.adapter / filename
        raise UploadError(f"Part {part!r} (file {filename!r}) is not expected here; a form has {_EXPECTED}")
