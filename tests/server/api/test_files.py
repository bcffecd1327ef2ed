"""OpenAI's Files and Uploads with the unmodified client: whole files, parts, what is cut off, tricks with names."""

import errno
import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from scripted_engine import ScriptedEngine
from scripted_service import Service, serving

from deltaserve.delta_store.sqlite_file import SqliteFile
from deltaserve.server.files.store import MIGRATIONS, FileStore
from deltaserve.server.files.uploads import Uploads

CONTENT = bytes(range(256)) * 1000
PART = 100_000


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("store")
    with serving(folder, ScriptedEngine(), max_upload_bytes=2**20, max_file_bytes=2**22) as running:
        yield running


@pytest.fixture
def client(service: Service) -> OpenAI:
    return service.openai()


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with service.http() as http:
        yield http


def stored(service: Service) -> list[str]:
    """Every file that holds what clients sent, parts and what is on its way included."""
    folder = service.app.state.settings.folder / "files"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def nothing_is_left(service: Service) -> Iterator[None]:
    yield
    for file in service.openai().files.list():
        service.openai().files.delete(file.id)

    def is_swept() -> bool:  # what an answer still held when its file was removed goes with the next sweep
        service.app.state.files.sweep()
        return stored(service) == []

    service.wait_until(is_swept)


def refusal(sent: httpx.Response, status: int, code: str) -> str:
    assert (sent.status_code, sent.json()["error"]["code"]) == (status, code), sent.text
    return sent.json()["error"]["message"]


def begun(http: httpx.Client, content: bytes = CONTENT, **more: object) -> str:
    body = {"filename": "a.bin", "bytes": len(content), "mime_type": "x/y", "purpose": "user_data"}
    return http.post("/v1/uploads", json=body | more).raise_for_status().json()["id"]


def part(http: httpx.Client, upload: str, data: bytes) -> str:
    return http.post(f"/v1/uploads/{upload}/parts", files={"data": data}).raise_for_status().json()["id"]


def test_a_file_is_sent_listed_read_and_removed(service: Service, client: OpenAI, tmp_path: Path) -> None:
    (tmp_path / "reviews.safetensors").write_bytes(CONTENT)
    file = client.files.create(file=tmp_path / "reviews.safetensors", purpose="user_data")
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert (file.bytes, file.filename, file.purpose) == (len(CONTENT), "reviews.safetensors", "user_data")
    assert (file.object, file.status, file.expires_at) == ("file", "processed", None)
    assert file.model_extra["sha256"] == digest
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == CONTENT
    assert stored(service) == [digest]
    assert client.files.delete(file.id).deleted
    with pytest.raises(NotFoundError, match="There is no file"):
        client.files.retrieve(file.id)
    with pytest.raises(NotFoundError, match="There is no file"):
        client.files.content(file.id)


def test_lists_go_on_where_they_stopped_and_find_by_purpose_and_digest(service: Service, client: OpenAI) -> None:
    files = [client.files.create(file=(f"{i}", b"%d" % (i % 2)), purpose="user_data") for i in range(5)]
    newest_first = [file.id for file in reversed(files)]
    assert [file.id for file in client.files.list(limit=2)] == newest_first  # the client asks for the next pages itself
    first = client.files.list(limit=2)
    assert ([file.id for file in first.data], first.has_more) == (newest_first[:2], True)
    assert [file.id for file in client.files.list(order="asc")] == newest_first[::-1]
    assert list(client.files.list(purpose="fine-tune")) == []
    digest = hashlib.sha256(b"1").hexdigest()
    found = client.files.list(extra_query={"sha256": digest})
    assert {file.id for file in found} == {files[1].id, files[3].id}
    client.files.delete(files[1].id)
    assert client.files.content(files[3].id).read() == b"1", "the bytes stay as long as a file has them"
    with pytest.raises(NotFoundError):
        client.files.list(after="file-unknown")


@pytest.mark.parametrize("source", ["path", "bytes"])
def test_a_large_file_goes_in_parts(client: OpenAI, tmp_path: Path, source: str) -> None:
    large = CONTENT * 8
    assert len(large) > 2**20, "more than one body may have"
    check = hashlib.md5(large).hexdigest()
    options = {"mime_type": "application/octet-stream", "purpose": "fine-tune", "part_size": PART, "md5": check}
    if source == "path":
        (tmp_path / "model.safetensors").write_bytes(large)
        upload = client.uploads.upload_file_chunked(file=tmp_path / "model.safetensors", **options)
    else:
        upload = client.uploads.upload_file_chunked(
            file=large, filename="model.safetensors", bytes=len(large), **options
        )
    assert (upload.status, upload.file.filename) == ("completed", "model.safetensors")
    assert upload.file.model_extra["sha256"] == hashlib.sha256(large).hexdigest()
    assert client.files.content(upload.file.id).read() == large


def test_parts_that_were_sent_stay_and_only_the_rest_is_sent(service: Service, client: OpenAI) -> None:
    upload = client.uploads.create(bytes=len(CONTENT), filename="a", mime_type="x/y", purpose="user_data")
    pieces = [CONTENT[i : i + PART] for i in range(0, len(CONTENT), PART)]
    last = client.uploads.parts.create(upload.id, data=pieces[2])
    first = client.uploads.parts.create(upload.id, data=pieces[0])
    with service.http() as later:
        there = later.get(f"/v1/uploads/{upload.id}").json()
    assert there["status"] == "pending"
    assert {one["id"]: (one["bytes"], one["sha256"]) for one in there["parts"]} == {
        one.id: (len(data), hashlib.sha256(data).hexdigest()) for one, data in ((first, pieces[0]), (last, pieces[2]))
    }
    with pytest.raises(BadRequestError, match=f"have {len(pieces[0] + pieces[2])} bytes together"):
        client.uploads.complete(upload.id, part_ids=[first.id, last.id])
    middle = client.uploads.parts.create(upload.id, data=pieces[1])
    order = [first.id, middle.id, last.id]
    with pytest.raises(BadRequestError, match="MD5"):
        client.uploads.complete(upload.id, part_ids=order, md5="0" * 32)
    done = client.uploads.complete(upload.id, part_ids=order, md5=hashlib.md5(CONTENT).hexdigest())
    assert client.files.content(done.file.id).read() == CONTENT
    assert client.uploads.complete(upload.id, part_ids=order).file == done.file, "asked again, the same"
    assert len(list(client.files.list())) == 1


def test_an_upload_is_found_by_the_digest_of_its_file_which_is_checked(http: httpx.Client) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    upload, other = begun(http, sha256=digest), begun(http)
    sent = part(http, upload, CONTENT[:PART])
    found = http.get("/v1/uploads", params={"sha256": digest}).raise_for_status().json()
    (one,) = found["data"]
    assert (one["id"], [p["id"] for p in one["parts"]]) == (upload, [sent])
    assert one["parts"][0]["sha256"] == hashlib.sha256(CONTENT[:PART]).hexdigest()
    assert [one["id"] for one in http.get("/v1/uploads").json()["data"]] == [upload, other]
    assert http.get("/v1/uploads", params={"sha256": "f" * 64}).json()["data"] == []
    wrong = part(http, upload, b"x" * (len(CONTENT) - PART))
    refused = http.post(f"/v1/uploads/{upload}/complete", json={"part_ids": [sent, wrong]})
    assert f"{digest} was announced" in refusal(refused, 400, "upload_incomplete")
    rest = part(http, upload, CONTENT[PART:])
    http.post(f"/v1/uploads/{upload}/complete", json={"part_ids": [sent, rest]}).raise_for_status()
    http.post(f"/v1/uploads/{other}/cancel").raise_for_status()
    assert http.get("/v1/uploads").json()["data"] == []


def test_a_cancelled_upload_is_over(service: Service, http: httpx.Client, client: OpenAI) -> None:
    upload = begun(http)
    sent = part(http, upload, b"x")
    assert client.uploads.cancel(upload).status == "cancelled"
    assert stored(service) == []
    assert client.uploads.cancel(upload).status == "cancelled"
    for again in (
        http.post(f"/v1/uploads/{upload}/parts", files={"data": b"x"}),
        http.post(f"/v1/uploads/{upload}/complete", json={"part_ids": [sent]}),
    ):
        assert "is cancelled" in refusal(again, 409, "upload_closed")


def test_too_much_is_refused_before_it_is_read(http: httpx.Client) -> None:
    body = {"filename": "a", "bytes": 2**22 + 1, "mime_type": "x", "purpose": "user_data"}
    message = refusal(http.post("/v1/uploads", json=body), 413, "upload_too_large")
    assert "DELTASERVE_MAX_FILE_BYTES" in message
    form = {"data": {"purpose": "user_data"}, "files": {"file": b"x" * 2**20}}
    refusal(http.post("/v1/files", **form), 413, "upload_too_large")
    upload = begun(http, b"x" * 10)
    big = http.post(f"/v1/uploads/{upload}/parts", files={"data": b"x" * 2**17})
    refusal(big, 413, "upload_too_large")
    part(http, upload, b"x" * 10)
    part(http, upload, b"x" * 10)
    assert "2 times the 10 bytes" in refusal(
        http.post(f"/v1/uploads/{upload}/parts", files={"data": b"x"}), 413, "upload_too_large"
    )
    http.post(f"/v1/uploads/{upload}/cancel").raise_for_status()


NAMES = ["../evil", "a/b", "..", "a\\b", "", "a\nb", "x" * 256]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_no_files_name(service: Service, http: httpx.Client, name: str) -> None:
    body = {"filename": name, "bytes": 1, "mime_type": "x", "purpose": "user_data"}
    refusal(http.post("/v1/uploads", json=body), 400, "upload_refused")
    disposition = name.replace("\n", "%0A") or ""
    head = {"Content-Type": "multipart/form-data; boundary=b"}
    form = (
        f'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n--b\r\n'
        f'Content-Disposition: form-data; name="file"; filename="{disposition}"\r\n\r\nx\r\n--b--\r\n'
    )
    sent = http.post("/v1/files", content=form.encode(), headers=head)
    if name != "a\nb":  # which a form writes as %0A, a name like any other
        refusal(sent, 400, "upload_refused")
    outside = service.app.state.settings.folder.parent
    assert not list(outside.rglob("evil"))


def test_ids_are_never_paths(http: httpx.Client) -> None:
    for method, path, code in (
        ("GET", "/v1/files/..%2F..%2Fregistry.sqlite3", "unknown_url"),
        ("GET", "/v1/files/..", "unknown_url"),
        ("GET", "/v1/files/%2e%2e%5cx/content", "file_not_found"),
        ("GET", "/v1/uploads/..%5c", "upload_not_found"),
        ("POST", "/v1/uploads/%2e%2e%5c/cancel", "upload_not_found"),
        ("GET", "/v1/jobs/..%5c", "job_not_found"),
    ):
        refusal(http.request(method, path), 404, code)


@pytest.mark.parametrize(
    ("fields", "files", "message"),
    [
        ({}, {"file": b"x"}, "'purpose'"),
        ({"purpose": "user_data"}, {"other": b"x"}, "'other'"),
        ({"purpose": "user_data", "colour": "red"}, {"file": b"x"}, "'colour'"),
        ({"purpose": "profit"}, {"file": b"x"}, "must be one of"),
        ({"purpose": "user_data", "expires_after[seconds]": "4000"}, {"file": b"x"}, "created_at"),
        (
            {"purpose": "user_data", "expires_after[anchor]": "created_at", "expires_after[seconds]": "10"},
            {"file": b"x"},
            "from 3600",
        ),
    ],
)
def test_a_form_that_is_wrong_is_refused_by_name(http: httpx.Client, fields, files, message) -> None:
    sent = http.post("/v1/files", data=fields, files=files)
    assert (sent.status_code, message in sent.json()["error"]["message"]) == (400, True), sent.text


def test_a_client_that_goes_away_leaves_nothing(service: Service, http: httpx.Client) -> None:
    def cut() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 2**17
        raise RuntimeError("cut off")

    head = {"Content-Type": "multipart/form-data; boundary=b"}
    upload = begun(http)
    for path in ("/v1/files", f"/v1/uploads/{upload}/parts"):
        with service.http() as other, pytest.raises(RuntimeError):
            other.post(path, content=cut(), headers=head)
    service.wait_until(lambda: stored(service) == [])
    client = service.openai()
    assert list(client.files.list()) == []
    client.uploads.cancel(upload)


def test_parts_come_several_at_once(service: Service, http: httpx.Client, client: OpenAI) -> None:
    pieces = [CONTENT[i : i + PART // 4] for i in range(0, len(CONTENT), PART // 4)]
    upload = begun(http)
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda piece: part(http, upload, piece), pieces))
    done = client.uploads.complete(upload, part_ids=ids, md5=hashlib.md5(CONTENT).hexdigest())
    assert client.files.content(done.file.id).read() == CONTENT


def test_a_full_disk_is_said_and_leaves_nothing(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("deltaserve.delta_store.blobs.HashingFile.write", full)
    sent = http.post("/v1/files", data={"purpose": "user_data"}, files={"file": b"x"})
    assert "disk is full" in refusal(sent, 507, "storage_full")
    refusal(http.put("/v1/variants/v", content=b"x"), 507, "storage_full")


def test_a_file_expires(client: OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    after = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=("a", b"x"), purpose="user_data", expires_after=after)
    assert file.expires_at == file.created_at + 3600
    now = time.time()
    monkeypatch.setattr("deltaserve.server.files.store.time.time", lambda: now + 3601)
    with pytest.raises(NotFoundError):
        client.files.retrieve(file.id)
    service.app.state.files.sweep()
    assert stored(service) == []


def test_a_database_of_before_the_digests_is_brought_up(tmp_path: Path) -> None:
    old = SqliteFile(tmp_path / "files.sqlite3", MIGRATIONS[:1])
    with old.transaction() as run:
        row = ("upload_1", "a", 3, "user_data", time.time(), time.time() + 60, None, "pending", None)
        run.execute("INSERT INTO uploads VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    old.close()
    (tmp_path / "files" / "parts" / "upload_1").mkdir(parents=True)
    files = FileStore(tmp_path / "files", tmp_path / "files.sqlite3")
    upload = Uploads(files, 60).get("upload_1")
    assert (upload.status, upload.sha256) == ("pending", None)
    files.close()


def test_what_crashes_and_time_leave_is_swept_at_the_next_start(tmp_path: Path) -> None:
    files = FileStore(tmp_path / "files", tmp_path / "files.sqlite3")
    uploads = Uploads(files, 0.05)
    upload = uploads.create("a", 3, "user_data", None)
    (tmp_path / "part").write_bytes(b"abc")
    uploads.add_part(upload.id, tmp_path / "part", 3, "0" * 64)
    (tmp_path / "files" / ("a" * 64)).write_bytes(b"a blob that no file has")
    (tmp_path / "files" / "incoming" / "half").mkdir()
    (tmp_path / "files" / "incoming" / "half" / "file").write_bytes(b"on its way when the server died")
    time.sleep(0.1)
    files.close()
    files = FileStore(tmp_path / "files", tmp_path / "files.sqlite3")
    uploads = Uploads(files, 0.05)
    assert uploads.get(upload.id).status == "expired"
    assert not [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
    files.close()
