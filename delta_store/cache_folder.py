"""Where things that can be computed again are kept, each under the identity of the files that it came from."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/deltaserve``, by default ``~/.cache/deltaserve``. It may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaserve"


def identity(files: Iterable[Path]) -> str:
    """Hex digest over path, inode, size and modification time: it changes when a file does, and costs no reading."""
    digest = hashlib.sha256()
    for path in sorted(file.resolve() for file in files):
        status = path.stat()
        digest.update(f"{path}\0{status.st_ino}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
