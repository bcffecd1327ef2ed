"""Files named by the SHA-256 of their bytes, on local disk, shared by every process that opens the same folder.

``<root>/<digest>`` is a whole blob: it got its name by rename, after it was synced. ``<root>/incoming/<random>/`` is
the workspace of one write under way. Both are guarded by advisory file locks, which end with their process:

- a workspace is locked as long as it is in use, so that opening the store can clear what a crash left;
- a blob is held (shared lock) while it is being registered and while a request needs it. ``sweep`` removes a blob only
  if nobody holds it and no version needs it; one that was held is removed by a later sweep.
"""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from deltaserve.delta_store.errors import CorruptArtifact, OptionError

DIGEST = re.compile("[0-9a-f]{64}")


class BlobStore:
    """The blobs under one folder. Safe to use from many threads and processes at once."""

    def __init__(self, root: Path) -> None:
        """Open ``root``, made if it is not there, and clear the leftovers of crashed writes."""
        self.root = root
        self._incoming = root / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        for folder in self._incoming.iterdir():
            with lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as abandoned:
                if abandoned:
                    shutil.rmtree(folder)

    def path(self, digest: str) -> Path:
        """Where the blob of this digest is, or would be."""
        if not DIGEST.fullmatch(digest):
            raise OptionError(f"{digest!r} is not a SHA-256 digest: give 64 hexadecimal digits in lower case")
        return self.root / digest

    def has(self, digest: str) -> bool:
        """Whether the blob can be held."""
        return self.path(digest).exists()

    def fetched(self, digest: str) -> Path:
        """Where the blob is, or would be; brought here first from wherever else it is kept."""
        return self.path(digest)

    def digests(self) -> set[str]:
        """Every blob that is there."""
        return {path.name for path in self.root.iterdir() if DIGEST.fullmatch(path.name)}

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder for one write, in the blobs' own file system; gone with all that is in it when the block ends."""
        folder = Path(tempfile.mkdtemp(dir=self._incoming))
        try:
            with lock(folder, fcntl.LOCK_SH):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def adopt(self, file: Path, digest: str) -> Iterator[Path]:
        """Make ``file``, from a workspace and with this digest, a blob, and hold it while the block runs.

        A blob of this digest that is there already stays, unless its bytes were damaged.
        """
        path = self.path(digest)
        sync(file)
        with ExitStack() as held:
            with self._naming():
                if not path.exists() or digest_of(path) != digest:
                    file.replace(path)
                    sync(self.root)
                held.enter_context(lock(path, fcntl.LOCK_SH))
            yield path

    @contextmanager
    def hold(self, digest: str) -> Iterator[Path]:
        """Keep a blob from being removed while the block runs.

        Raises CorruptArtifact if its file is not there.
        """
        with lock(self.path(digest), fcntl.LOCK_SH) as there:
            if not there:
                raise CorruptArtifact(f"The file of version {digest} is missing from the store; upload it again")
            yield self.path(digest)

    def check(self) -> None:
        """Raise RegistryUnavailable if nothing can be put here; local folders were made when they were opened."""

    def sweep(self, needed: Callable[[], Set[str]]) -> int:
        """Remove the blobs that ``needed`` does not list and nobody holds; returns how many were removed."""
        removed = 0
        for digest in self.digests() - needed():
            with self._naming(), lock(self.path(digest), fcntl.LOCK_EX | fcntl.LOCK_NB) as free:
                # Asked again under the lock: whoever registers a blob holds it until the registry lists it.
                if free and digest not in needed():
                    self.path(digest).unlink()
                    removed += 1
        return removed

    def _naming(self) -> AbstractContextManager[bool]:
        """One thread of one process at a time gives or takes names."""
        return lock(self._incoming, fcntl.LOCK_EX)


class HashingFile:
    """A file being written whose digest and size are known when its last byte is."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> None:
        """Append and count."""
        self._file.write(data)
        self._hash.update(data)
        self.size_bytes += len(data)

    @property
    def digest(self) -> str:
        """SHA-256 of what was written so far, in hex."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_blobs(root: Path, url: str | None, part: str) -> BlobStore:
    """The store of one kind of blob: the local folder, or ``url``/``part`` with the folder as its cache."""
    if url is None:
        return BlobStore(root)
    try:
        from deltaserve.delta_store.object_blobs import ObjectBlobs
    except ModuleNotFoundError as error:
        raise OptionError("An object store needs the package obstore: pip install 'deltaserve[blobs]'") from error
    return ObjectBlobs(root, f"{url.rstrip('/')}/{part}")


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock(path: Path, kind: int) -> Iterator[bool]:
    """Lock a file or folder while the block runs; False if it is not there, or with LOCK_NB, if it is locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _acquire(descriptor, kind) and _is_still(path, descriptor)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the name stands for the file that was opened: while we waited it may have been removed."""
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
