"""Blobs in a real S3 server: whole or not there, fetched once, verified, swept when nobody needs them."""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import obstore
import pytest
from object_stores import s3_server
from redis_servers import free_port

from deltaserve.delta_store import object_blobs
from deltaserve.delta_store.blobs import BlobStore, open_blobs
from deltaserve.delta_store.errors import CorruptArtifact, OptionError, RegistryUnavailable


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield "s3://tests"


@pytest.fixture
def url(bucket):
    return f"{bucket}/{uuid4().hex}"


@pytest.fixture
def blobs(url, tmp_path):
    return open_blobs(tmp_path / "one", url, "blobs")


@pytest.fixture
def elsewhere(url, tmp_path):
    """The same store from another machine: another folder."""
    return open_blobs(tmp_path / "other", url, "blobs")


def put(blobs: BlobStore, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    with blobs.workspace() as folder:
        (folder / "file").write_bytes(content)
        with blobs.adopt(folder / "file", digest):
            return digest


def stored(blobs) -> set[str]:
    return {one["path"] for batch in obstore.list(blobs._objects) for one in batch}


def nothing_needed() -> set[str]:
    return set()


def test_what_one_machine_puts_another_holds(blobs, elsewhere):
    content = os.urandom(12 * 2**20)
    digest = put(blobs, content)
    assert stored(blobs) == {digest}
    assert elsewhere.digests() == set()
    with elsewhere.hold(digest) as path:
        assert path.read_bytes() == content
    assert elsewhere.digests() == {digest}
    assert [path.name for path in elsewhere.root.iterdir() if path.is_file()] == [digest]
    assert list((elsewhere.root / "incoming").iterdir()) == []


def test_many_who_ask_at_once_fetch_it_once(blobs, elsewhere, monkeypatch):
    digest = put(blobs, b"asked for by many")
    fetches = []

    def counted(*arguments):
        fetches.append(arguments)
        time.sleep(0.05)
        return get(*arguments)

    get = obstore.get
    monkeypatch.setattr(object_blobs.obstore, "get", counted)
    with ThreadPoolExecutor(8) as pool:
        assert {path.read_bytes() for path in pool.map(elsewhere.fetched, [digest] * 8)} == {b"asked for by many"}
    assert len(fetches) == 1


def test_damaged_bytes_never_get_a_blobs_name(blobs, elsewhere):
    digest = put(blobs, b"good bytes")
    obstore.put(blobs._objects, digest, b"bad")
    with pytest.raises(CorruptArtifact, match="upload it again"), elsewhere.hold(digest):
        pass
    assert elsewhere.digests() == set()
    put(blobs, b"good bytes")
    with elsewhere.hold(digest) as path:
        assert path.read_bytes() == b"good bytes"


def test_what_is_nowhere_is_said_to_be_missing(elsewhere):
    with pytest.raises(CorruptArtifact, match="missing from the store"), elsewhere.hold("0" * 64):
        pass


def test_sweep_removes_old_blobs_that_no_version_needs_and_leaves_new_ones(blobs, monkeypatch):
    kept, dropped = put(blobs, b"kept"), put(blobs, b"dropped")
    assert blobs.sweep(lambda: {kept}) == 1
    assert stored(blobs) == {kept, dropped}
    monkeypatch.setattr(object_blobs, "GRACE_SECONDS", -5.0)
    assert blobs.sweep(lambda: {kept}) == 1
    assert stored(blobs) == {kept} == blobs.digests()
    assert blobs.sweep(nothing_needed) == 2
    assert stored(blobs) == set()


def test_a_store_that_does_not_answer_is_named_and_nothing_is_registered(tmp_path, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    blobs = open_blobs(tmp_path, "s3://tests/gone", "blobs")
    begun = time.monotonic()
    with pytest.raises(RegistryUnavailable, match=r"object store s3://tests/gone/blobs failed"):
        put(blobs, b"content")
    with pytest.raises(RegistryUnavailable):
        blobs.check()
    with pytest.raises(RegistryUnavailable), blobs.hold("0" * 64):
        pass
    assert time.monotonic() - begun < 20
    assert blobs.digests() == set()
    assert list((tmp_path / "incoming").iterdir()) == []


def test_a_check_makes_the_bucket_of_a_fresh_store_and_leaves_nothing_in_it(tmp_path, bucket):
    blobs = open_blobs(tmp_path, f"s3://{uuid4().hex}", "blobs")
    blobs.check()
    assert blobs.sweep(nothing_needed) == 0
    assert stored(blobs) == set()


@pytest.mark.parametrize("url", ["nonsense", "ftp://host/path"])
def test_an_address_of_no_object_store_is_refused(tmp_path, url):
    with pytest.raises(OptionError, match="use s3://BUCKET/PREFIX"):
        open_blobs(tmp_path, url, "blobs")
