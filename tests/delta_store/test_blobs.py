"""The blob store: whole files under their digest, nothing half-written, nothing removed that somebody needs."""

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from deltaserve.delta_store.blobs import BlobStore, HashingFile, digest_of
from deltaserve.delta_store.errors import CorruptArtifact, OptionError


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(tmp_path / "blobs")


def put(blobs: BlobStore, content: bytes) -> str:
    with blobs.workspace() as folder:
        with HashingFile(folder / "file") as file:
            file.write(content)
        with blobs.adopt(folder / "file", file.digest):
            return file.digest


def nothing_needed() -> set[str]:
    return set()


def test_a_blob_is_found_under_the_sha256_of_its_bytes(blobs):
    digest = put(blobs, b"some bytes")
    assert digest == hashlib.sha256(b"some bytes").hexdigest() == digest_of(blobs.path(digest))
    assert blobs.path(digest).read_bytes() == b"some bytes"
    assert blobs.digests() == {digest}


def test_hashing_counts_what_comes_in_pieces(tmp_path):
    with HashingFile(tmp_path / "file") as file:
        for piece in (b"a", b"", b"bc" * 1000):
            file.write(piece)
    assert file.size_bytes == 2001
    assert file.digest == digest_of(tmp_path / "file")


def test_a_write_that_fails_leaves_nothing(blobs):
    with pytest.raises(FileExistsError), blobs.workspace() as folder:
        write_twice(folder / "file")
    assert blobs.digests() == set()
    assert list((blobs.root / "incoming").iterdir()) == []


def write_twice(path):
    for _ in range(2):
        with HashingFile(path) as file:
            file.write(b"half")


def test_leftovers_of_a_crash_are_cleared_at_start_and_writes_under_way_are_not(blobs):
    crash = (
        "import os, sys; from pathlib import Path; from deltaserve.delta_store.blobs import BlobStore\n"
        "with BlobStore(Path(sys.argv[1])).workspace() as folder: (folder / 'half').write_bytes(b'x'); os._exit(1)"
    )
    with blobs.workspace() as ours:
        subprocess.run([sys.executable, "-c", crash, str(blobs.root)], check=False)
        assert len(list((blobs.root / "incoming").iterdir())) == 2
        BlobStore(blobs.root)
        assert list((blobs.root / "incoming").iterdir()) == [ours]


def test_sweep_removes_what_no_version_needs(blobs):
    kept, dropped = put(blobs, b"kept"), put(blobs, b"dropped")
    assert blobs.sweep(lambda: {kept}) == 1
    assert blobs.digests() == {kept}
    assert not blobs.path(dropped).exists()


def test_sweep_leaves_what_a_request_holds_until_it_lets_go(blobs):
    digest = put(blobs, b"in use")
    with blobs.hold(digest) as path, blobs.hold(digest):
        assert blobs.sweep(nothing_needed) == 0
        assert path.read_bytes() == b"in use"
    assert blobs.sweep(nothing_needed) == 1


def test_a_hold_of_another_process_counts(blobs):
    digest = put(blobs, b"in use elsewhere")
    holder = (
        "import sys; from pathlib import Path; from deltaserve.delta_store.blobs import BlobStore\n"
        "with BlobStore(Path(sys.argv[1])).hold(sys.argv[2]): print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(blobs.root), digest]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert blobs.sweep(nothing_needed) == 0
        process.kill()
    assert blobs.sweep(nothing_needed) == 1


def test_a_blob_is_not_swept_between_its_writing_and_its_registering(blobs):
    with blobs.workspace() as folder:
        (folder / "file").write_bytes(b"new")
        digest = digest_of(folder / "file")
        with blobs.adopt(folder / "file", digest):
            assert blobs.sweep(nothing_needed) == 0
            assert blobs.path(digest).exists()


def test_a_blob_that_was_registered_meanwhile_is_not_swept(blobs):
    digest = put(blobs, b"registered late")
    answers = iter([set(), {digest}])
    assert blobs.sweep(lambda: next(answers)) == 0
    assert blobs.digests() == {digest}


def test_putting_good_bytes_again_repairs_a_damaged_file_and_keeps_a_good_one(blobs):
    digest = put(blobs, b"good bytes")
    good = blobs.path(digest).stat().st_ino
    put(blobs, b"good bytes")
    assert blobs.path(digest).stat().st_ino == good
    blobs.path(digest).write_bytes(b"damage")
    put(blobs, b"good bytes")
    assert blobs.path(digest).read_bytes() == b"good bytes"


def test_holding_what_is_not_there_says_so(blobs):
    with pytest.raises(CorruptArtifact, match="missing from the store"), blobs.hold("0" * 64):
        pass


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63])
def test_a_digest_cannot_be_another_path(blobs, digest):
    with pytest.raises(OptionError, match="not a SHA-256 digest"):
        blobs.path(digest)


def test_the_same_bytes_put_and_swept_at_once_are_there_whenever_they_are_held(blobs):
    needed: set[str] = set()

    def put_often(_: int) -> None:
        for _ in range(30):
            with blobs.workspace() as folder:
                (folder / "file").write_bytes(b"contended")
                with blobs.adopt(folder / "file", digest_of(folder / "file")) as path:
                    assert path.read_bytes() == b"contended"

    def sweep_often(_: int) -> None:
        for _ in range(100):
            blobs.sweep(lambda: needed)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda job: job(0), [put_often] * 4 + [sweep_often] * 2))
