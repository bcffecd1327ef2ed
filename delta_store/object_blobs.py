"""Blobs in an object store (S3, Google Cloud Storage, Azure, ...), with the local folder as their cache."""

import fcntl
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import ObjectStore, from_url

from deltaserve.delta_store.blobs import DIGEST, BlobStore, digest_of, lock
from deltaserve.delta_store.errors import OptionError, RegistryUnavailable

GRACE_SECONDS = 3600.0
"""A blob is older than this before a sweep removes it from the object store: another server may be registering it."""
PIECE_BYTES = 8 * 2**20


class ObjectBlobs(BlobStore):
    """The blobs below ``url``; ``root`` keeps those that were used here.

    Credentials, region and endpoint come from the environment, under the names that the store's own tools use.
    Raises OptionError for an address that names no object store.
    """

    def __init__(self, root: Path, url: str) -> None:
        super().__init__(root)
        self._url = url
        try:
            self._objects: ObjectStore = from_url(
                url,
                client_options={
                    "allow_http": True,
                    "connect_timeout": timedelta(seconds=2),
                    "timeout": timedelta(seconds=60),
                },
                retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=5)},
            )
        except (BaseError, ValueError) as error:
            raise OptionError(f"{url!r} is no object store: {error}; use s3://BUCKET/PREFIX or the like") from error

    def has(self, digest: str) -> bool:
        """True: what the registry names was put there before it was registered."""
        return True

    def fetched(self, digest: str) -> Path:
        """Where the blob is, downloaded if it is not here yet: once, whoever asks at the same time."""
        path = self.path(digest)
        if not path.exists():
            self._download(digest)
        return path

    @contextmanager
    def hold(self, digest: str) -> Iterator[Path]:
        """Keep the local copy while the block runs. Raises CorruptArtifact, RegistryUnavailable."""
        self.fetched(digest)
        with super().hold(digest) as path:
            yield path

    @contextmanager
    def adopt(self, file: Path, digest: str) -> Iterator[Path]:
        """As for local blobs; the blob is in the object store, whole, when the block begins."""
        with self._translated():
            obstore.put(self._objects, digest, file)  # also if it is there: a sweep spares what is new
        with super().adopt(file, digest) as path:
            yield path

    def check(self) -> None:
        """Put something and remove it: some stores make a bucket only then, and others may forbid it."""
        with self._translated():
            obstore.put(self._objects, "check", b"")
            obstore.delete(self._objects, "check")

    def sweep(self, needed: Callable[[], Set[str]]) -> int:
        """As for local blobs, and those in the object store that have been there for a while."""
        removed = super().sweep(needed)
        oldest = time.time() - GRACE_SECONDS
        with self._translated():
            stored = [one for batch in obstore.list(self._objects) for one in batch]
            old = {one["path"] for one in stored if one["last_modified"].timestamp() < oldest}
            unneeded = {path for path in old if DIGEST.fullmatch(path)} - needed()
            obstore.delete(self._objects, list(unneeded))
        return removed + len(unneeded)

    def _download(self, digest: str) -> None:
        """One thread of one process at a time fetches a blob; the others find it. Damaged bytes never get its name."""
        waiting = self.root / f"{digest}.fetching"
        waiting.touch()
        with lock(waiting, fcntl.LOCK_EX), self.workspace() as folder:
            try:
                if self.path(digest).exists():
                    return
                with self._translated():
                    answer = obstore.get(self._objects, digest)
                    with (folder / "file").open("wb") as file:
                        for piece in answer.stream(min_chunk_size=PIECE_BYTES):
                            file.write(piece)
                if digest_of(folder / "file") == digest:
                    with super().adopt(folder / "file", digest):
                        pass
            except (NotFoundError, FileNotFoundError):
                return  # it is nowhere: hold says so
            finally:
                waiting.unlink(missing_ok=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except NotFoundError:
            raise
        except BaseError as error:
            reason = str(error).strip().splitlines()[0]
            raise RegistryUnavailable(f"The object store {self._url} failed: {reason}") from error
