"""OpenAI's Files and Uploads with the unmodified client: whole files, parts, what is cut off, tricks with names."""

import hashlib
from pathlib import Path

import httpx
import pytest
from openai import NotFoundError, OpenAI
from scripted_engine import ScriptedEngine
from scripted_service import Service, serving

CONTENT = bytes(range(256)) * 1000


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    with serving(folder, ScriptedEngine(), max_upload_bytes=2**20, max_file_bytes=2**22) as running:
        yield running


@pytest.fixture
def client(service: Service) -> OpenAI:
    return service.openai()


def stored(service: Service) -> list[str]:
    """Every file of the store that holds what clients sent, parts and what is on its way included."""
    folder = service.app.state.settings.folder / "files"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def nothing_is_left(service: Service):
    yield
    for file in service.openai().files.list():
        service.openai().files.delete(file.id)
    assert stored(service) == []


def refusal(sent: httpx.Response, status: int, code: str) -> str:
    assert (sent.status_code, sent.json()["error"]["code"]) == (status, code), sent.text
    return sent.json()["error"]["message"]


def test_a_file_is_sent_listed_read_and_removed(service: Service, client: OpenAI, tmp_path: Path) -> None:
    (tmp_path / "reviews.safetensors").write_bytes(CONTENT)
    file = client.files.create(file=tmp_path / "reviews.safetensors", purpose="user_data")
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert (file.bytes, file.filename, file.purpose) == (len(CONTENT), "reviews.safetensors", "user_data")
    assert file.model_extra["sha256"] == digest
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == CONTENT
    assert stored(service) == [digest]
    assert client.files.delete(file.id).deleted
    with pytest.raises(NotFoundError, match="There is no file"):
        client.files.retrieve(file.id)
