"""Case C-oversized-upload: bodies too large, wrong or broken off; ``test_large_upload.py`` has one that is accepted."""

import hashlib
import json
import socket

import httpx
import pytest
from running_server import artifact, running, wait_until

LIMIT = 2**20
FIVE = 5 * 10**6


@pytest.fixture(scope="module")
def server(base, tmp_path_factory):
    with running(base, tmp_path_factory.mktemp("store"), max_upload_bytes=LIMIT, upload_idle_seconds=0.5) as server:
        yield server


@pytest.fixture(scope="module")
def good(base, tmp_path_factory):
    return artifact(base, tmp_path_factory.mktemp("artifacts") / "good.safetensors")


@pytest.fixture(autouse=True)
def nothing_is_left_and_the_base_answers(server):
    yield
    assert server.http.get("/v1/variants").json()["data"] == []
    wait_until(lambda: server.files() == set(), 1)
    asked = server.http.post("/v1/completions", json={"model": "base", "prompt": [5], "max_tokens": 2})
    assert asked.status_code == 200, asked.text


def refusal(response: httpx.Response, status: int, code: str) -> str:
    """The message of an error in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    return error["message"]


class Raw:
    """A connection on which headers may lie."""

    def __init__(self, url: str, head: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        self.socket.sendall(f"PUT /v1/variants/v HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())

    def answer(self) -> tuple[int, dict]:
        received = b""
        while b"}}" not in received and (chunk := self.socket.recv(65536)):
            received += chunk
        self.socket.close()
        head, _, body = received.decode().partition("\r\n\r\n")
        return int(head.split()[1]), json.JSONDecoder().raw_decode(body)[0]["error"]


def test_c_oversized_upload_1_an_announced_length_over_the_limit_is_refused_unread(server):
    raw = Raw(server.url, f"Content-Length: {FIVE}")
    status, error = raw.answer()  # not a byte of the body was sent
    assert (status, error["code"]) == (413, "upload_too_large")
    assert str(LIMIT) in error["message"]
    assert "DELTASERVE_MAX_UPLOAD_BYTES" in error["message"]
    sent = server.http.put("/v1/variants/v", content=b"x" * FIVE)
    refusal(sent, 413, "upload_too_large")


def test_c_oversized_upload_2_a_chunked_body_is_refused_as_soon_as_it_passes_the_limit(server):
    raw = Raw(server.url, "Transfer-Encoding: chunked")
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    raw.socket.sendall(piece * (LIMIT // 65536 + 1))  # and then waits: no end comes
    status, error = raw.answer()
    assert (status, error["code"]) == (413, "upload_too_large")


def test_c_oversized_upload_3_a_length_smaller_than_the_body_is_refused(server, good):
    content = good.read_bytes()
    raw = Raw(server.url, f"Content-Length: {len(content) - 100}")
    raw.socket.sendall(content)
    status, error = raw.answer()
    assert (status, error["code"]) == (400, "corrupt_artifact")


def test_c_oversized_upload_3_a_length_larger_than_the_body_is_refused(server, good):
    content = good.read_bytes()
    raw = Raw(server.url, f"Content-Length: {len(content) + 100}")
    raw.socket.sendall(content)
    status, error = raw.answer()
    assert (status, error["code"]) == (400, "upload_incomplete")
    assert "0.5 s" in error["message"]


def test_c_oversized_upload_5_a_client_that_goes_away_leaves_nothing(server, good):
    content = good.read_bytes()
    raw = Raw(server.url, f"Content-Length: {len(content)}")
    raw.socket.sendall(content[: len(content) * 6 // 10])
    raw.socket.close()
    wait_until(lambda: server.files() == set(), 1)
    again = server.http.put("/v1/variants/v", content=content)
    assert again.status_code == 201, again.text
    assert server.http.delete("/v1/variants/v").status_code == 200


def test_c_oversized_upload_6_a_form_of_many_parts_is_refused(server):
    sent = server.http.post("/v1/variants", files=[("adapter", (f"{i}", b"x")) for i in range(2000)])
    refusal(sent, 400, "upload_refused")
    sent = server.http.post("/v1/variants", files=[("name", (None, b"")) for i in range(2000)])
    assert "32 parts" in refusal(sent, 413, "upload_too_large")


def test_a_form_is_counted_while_it_streams_too(server):
    sent = server.http.post("/v1/variants", data={"name": "v"}, files={"artifact": b"x" * FIVE})
    refusal(sent, 413, "upload_too_large")
    sent = server.http.post("/v1/variants", data={"name": "v" * 2000}, files={"artifact": b"x"})
    assert "'name'" in refusal(sent, 413, "upload_too_large")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"artifact": b"x"}, "'name'"),
        ({"artifact": b"x", "name": (None, b"v"), "colour": (None, b"red")}, "'colour'"),
        ({"name": (None, b"v")}, "'artifact'"),
        ({"name": (None, b"v"), "adapter": ("../../evil", b"x")}, "evil"),
        ({"name": (None, b"v"), "adapter": ("adapter_model.bin", b"x")}, "adapter_model.bin"),
        ({"name": (None, b"v"), "adapter": ("adapter_config.json", b"{}")}, "adapter_model.safetensors is missing"),
    ],
)
def test_a_form_with_other_parts_than_it_may_have_is_refused(server, parts, message):
    assert message in refusal(server.http.post("/v1/variants", files=parts), 400, "upload_refused")


def test_a_form_that_is_cut_short_or_none_at_all_is_refused(server):
    head = {"Content-Type": "multipart/form-data; boundary=b"}
    cut = b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nv'
    refusal(server.http.post("/v1/variants", content=cut, headers=head), 400, "upload_incomplete")
    refusal(server.http.post("/v1/variants", content=b"nonsense", headers=head), 400, "upload_refused")
    sent = server.http.post("/v1/variants", content=b"{}", headers={"Content-Type": "text/plain"})
    assert "multipart/form-data" in refusal(sent, 400, "upload_refused")
    refusal(server.http.post("/v1/variants", json={}), 400, "missing_required_parameter")
    head = {"Content-Type": f"multipart/form-data; boundary={'b' * 71}"}
    assert "1 to 70 bytes" in refusal(
        server.http.post("/v1/variants", content=b"", headers=head), 400, "upload_refused"
    )


def test_the_headers_of_a_forms_part_are_bounded(server):
    head = {"Content-Type": "multipart/form-data; boundary=b"}
    for headers in (b"X: " + b"y" * FIVE, b"".join(b"X-%d: y\r\n" % number for number in range(1000))):
        sent = server.http.post("/v1/variants", content=b"--b\r\n" + headers + b"\r\n\r\nv", headers=head)
        assert sent.status_code in (400, 413), sent.text


def test_what_is_wrong_with_an_adapter_is_said_without_the_servers_paths(server):
    files = [("adapter", ("adapter_config.json", b"{}")), ("adapter", ("adapter_model.safetensors", b"x"))]
    sent = server.http.post("/v1/variants", data={"name": "v"}, files=files)
    message = refusal(sent, 400, "unsupported_checkpoint")
    assert message.startswith("the upload/adapter_config.json: peft_type is None")
    assert str(server.store) not in message


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("?digest=" + "0" * 64, {}),
        ("", {"X-Checksum-Sha256": "0" * 64}),
        ("", {"Repr-Digest": f"sha-256=:{'A' * 43}=:"}),
    ],
)
def test_a_wrong_checksum_is_refused(server, good, query, headers):
    sent = server.http.put(f"/v1/variants/v{query}", content=good.read_bytes(), headers=headers)
    assert hashlib.sha256(good.read_bytes()).hexdigest() in refusal(sent, 400, "upload_incomplete")


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("?digest=abc", {}),
        ("", {"Repr-Digest": "md5=:AAAA:"}),
        ("?digest=" + "0" * 64, {"X-Checksum-Sha256": "1" * 64}),
    ],
)
def test_a_malformed_or_ambiguous_checksum_is_refused(server, good, query, headers):
    sent = server.http.put(f"/v1/variants/v{query}", content=good.read_bytes(), headers=headers)
    refusal(sent, 400, "upload_refused")


@pytest.mark.parametrize("header", [{"Content-Encoding": "gzip"}, {"Content-Range": "bytes 100-199/200"}])
def test_part_of_a_file_or_an_encoded_one_is_refused(server, good, header):
    sent = server.http.put("/v1/variants/v", content=good.read_bytes(), headers=header)
    assert next(iter(header)) in refusal(sent, 400, "upload_refused")


def test_a_checksum_of_a_form_is_refused_rather_than_ignored(server, good):
    files = {"artifact": good.read_bytes()}
    sent = server.http.post("/v1/variants", data={"name": "v"}, files=files, params={"digest": "0" * 64})
    assert "PUT" in refusal(sent, 400, "upload_refused")


def test_errors_name_the_field(server, good):
    for sent, name, code in (
        (server.http.put("/v1/variants/a b", content=b""), "name", "invalid_name"),
        (server.http.post("/v1/variants", data={"name": "a b"}, files={"artifact": b"x"}), "name", "invalid_name"),
        (server.http.get("/v1/profiles/abc"), "digest", "invalid_value"),
        (server.http.put("/v1/profiles/abc", content=b""), "digest", "invalid_value"),
    ):
        refusal(sent, 400, code)
        assert sent.json()["error"]["param"] == name
    missing = server.http.get(f"/v1/profiles/{'0' * 64}")
    refusal(missing, 404, "profile_not_found")
    assert missing.json()["error"]["param"] == "digest"
