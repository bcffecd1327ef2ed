"""``POST /v1/variants`` with JSON: stored files become a variant, and bytes that are there are not sent again."""

import hashlib
import time
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from peft import LoraConfig, get_peft_model
from running_server import Running, artifact, running
from safetensors.torch import save_file
from tiny_encoders import save_encoder, tiny_encoder
from tiny_models import save, tiny_llama

from deltaserve.server.files.contents import contents_of


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory) -> Path:
    return artifact(base, tmp_path_factory.mktemp("artifacts") / "good.safetensors")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def sent(client: OpenAI, *files: tuple[str, bytes]) -> list[str]:
    return [client.files.create(file=file, purpose="user_data").id for file in files]


def post(server: Running, **body: object) -> dict:
    answer = server.http.post("/v1/variants", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


def refusal(server: Running, body: object, status: int, code: str) -> str:
    answer = server.http.post("/v1/variants", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    return answer.json()["error"]["message"]


def test_an_artifact_in_a_file(server: Running, client: OpenAI, good: Path) -> None:
    (file,) = sent(client, (good.name, good.read_bytes()))
    receipt = post(server, name="v", file_id=file)
    assert receipt["digest"] == hashlib.sha256(good.read_bytes()).hexdigest()
    assert post(server, name="w", file_ids=[file])["digest"] == receipt["digest"]
    client.files.delete(file)
    asked = server.http.post("/v1/completions", json={"model": "v", "prompt": [5], "max_tokens": 2})
    assert (asked.status_code, asked.headers["x-deltaserve-version"]) == (200, receipt["digest"])


def test_bytes_that_are_there_are_not_sent_again(server: Running, client: OpenAI, base: Path, tmp_path: Path) -> None:
    file = artifact(base, tmp_path / "other.safetensors", seed=1)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    body = {"name": "again", "digest": digest}
    assert digest in refusal(server, body, 404, "file_not_found")
    (file_id,) = sent(client, (file.name, file.read_bytes()))
    assert post(server, **body)["version"] == 1, "of a stored file"
    client.files.delete(file_id)
    assert post(server, name="third", digest=digest)["digest"] == digest, "of another variant"


def test_an_adapter_in_files(server: Running, client: OpenAI, adapter: Path) -> None:
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = sent(client, *((name, (adapter / name).read_bytes()) for name in names))
    assert post(server, name="lora", file_ids=files)["tensors_applied"] == 2
    missing = refusal(server, {"name": "lora", "file_ids": files[:1]}, 400, "upload_refused")
    assert "adapter_model.safetensors is missing" in missing


def test_what_makes_no_sense_is_refused_by_name(server: Running, client: OpenAI, good: Path, tmp_path: Path) -> None:
    (file,) = sent(client, (good.name, good.read_bytes()))
    for body, code, said in (
        ({"name": "v"}, "invalid_value", "exactly one of 'file_id', 'file_ids' and 'digest'"),
        ({"name": "v", "file_id": file, "digest": "0" * 64}, "invalid_value", "exactly one of"),
        ({"name": "v", "file_id": file, "max_kl": 1, "bytes": 10_000}, "invalid_value", "not max_kl and bytes"),
        ({"file_id": file}, "missing_required_parameter", "'name'"),
        ({"name": "v", "file_id": file, "colour": 1}, "unknown_parameter", "'colour'"),
        ({"name": "a b", "file_id": file}, "invalid_name", "'a b'"),
        ({"name": "base", "file_id": file}, "invalid_name", "base's own id"),
        ({"name": "v", "file_id": file, "max_kl": "2%"}, "invalid_value", "'max_kl' is for a whole checkpoint"),
        ({"name": "v", "file_id": file, "force": True}, "invalid_value", "'force' is for"),
        ({"name": "v", "file_ids": [file, file]}, "upload_refused", "Two of the files are called"),
        ([], "invalid_body", "JSON object"),
    ):
        assert said in refusal(server, body, 400, code)
    broken = server.http.post("/v1/variants", content=b"{", headers={"Content-Type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")
    assert "no file 'file-0'" in refusal(server, {"name": "v", "file_id": "file-0"}, 404, "file_not_found")


def test_what_makes_no_sense_of_a_checkpoint_is_refused_before_a_job(server: Running, client: OpenAI) -> None:
    save(tiny_llama(), folder := Path(server.store.parent / "whole"))
    weights = (folder / "model.safetensors").read_bytes()
    (file,) = sent(client, ("model.safetensors", weights))
    (pickle,) = sent(client, ("pytorch_model.bin", b"PK"))
    (readme,) = sent(client, ("README.md", b"#"))
    checkpoint = {"name": "v", "file_id": file}
    for body, code, said in (
        (checkpoint | {"max_kl": 0}, "invalid_value", "above 0"),
        (checkpoint | {"max_kl": "two"}, "invalid_value", "max_kl"),
        (checkpoint | {"min_agreement": 1.5}, "invalid_value", "'min_agreement'"),
        (checkpoint | {"bytes": 100}, "invalid_value", "'bytes'"),
        (checkpoint | {"method": "magic"}, "invalid_value", "magic"),
        (checkpoint | {"options": {"rank": 1}}, "invalid_value", "name it in 'method'"),
        (checkpoint | {"method": "dense", "options": {"drop": 0.5}}, "invalid_value", "no option drop"),
        (checkpoint | {"method": "dense", "options": {"rank": "x"}}, "invalid_value", "must be of type int"),
        ({"name": "v", "file_ids": [file, pickle]}, "upload_refused", "is a pickle"),
        ({"name": "v", "file_ids": [file, readme]}, "upload_refused", "'README.md' has no place"),
    ):
        assert said in refusal(server, body, 400, code)
    assert server.http.get("/v1/jobs").json()["data"] == []


def test_an_encoders_checkpoint_is_refused(tmp_path: Path) -> None:
    base = save_encoder(tiny_encoder(), tmp_path / "encoder")
    with running(base, tmp_path / "store") as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        (file,) = sent(client, ("model.safetensors", (base / "model.safetensors").read_bytes()))
        assert "is an encoder" in refusal(server, {"name": "v", "file_id": file}, 400, "invalid_value")


def test_shards_and_artifacts_are_told_apart_by_what_they_hold(good: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    assert contents_of([("model.safetensors", good)]).kind == "artifact"
    assert contents_of([("reviews.safetensors", tmp_path / "weights.safetensors")]).kind == "checkpoint"


def test_versions_say_who_uploaded_them_and_when(base: Path, good: Path, tmp_path: Path) -> None:
    with running(base, tmp_path) as server:
        assert server.http.put("/v1/variants/v", content=good.read_bytes()).json()["uploaded_by"] is None
        keys = server.app.state.keys
        ci, ann = ({"Authorization": f"Bearer {keys.create(name, 'admin')[1]}"} for name in ("ci", "ann"))
        began = int(time.time())
        newer = artifact(base, tmp_path / "newer.safetensors", seed=2).read_bytes()
        server.http.put("/v1/variants/v", content=newer, headers=ci).raise_for_status()
        server.http.post("/v1/variants/v/alias", json={"alias": "w"}, headers=ann).raise_for_status()
        body = {"name": "x", "digest": hashlib.sha256(newer).hexdigest()}
        server.http.post("/v1/variants", json=body, headers=ann).raise_for_status()
        versions = server.http.get("/v1/variants/v/versions", headers=ann).json()["data"]
        assert [one["uploaded_by"] for one in versions] == ["ci", None]
        assert began <= versions[0]["created"] <= time.time()
        current = {one["id"]: one["uploaded_by"] for one in server.http.get("/v1/variants", headers=ann).json()["data"]}
        assert current == {"v": "ci", "w": "ann", "x": "ann"}
        infer = {"Authorization": f"Bearer {keys.create('app', 'infer')[1]}"}
        for path in ("/v1/files", "/v1/uploads/x", "/v1/jobs", "/v1/jobs/x/events"):
            assert server.http.get(path, headers=infer).json()["error"]["code"] == "insufficient_permissions"
