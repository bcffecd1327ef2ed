"""Variants over real HTTP: receipts, versions, refusals, races (B-cut-short, E-unknown-model)."""

import base64
import hashlib
import json
import pickle
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from running_server import Running, artifact, dense_part
from transformers import AutoModelForCausalLM

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.fingerprint import fingerprint
from deltaserve.delta_store.profile import file_name, write_profile


@pytest.fixture
def made(base, tmp_path):
    """Make the bytes of an artifact that differs with ``seed``."""
    return lambda seed=0, **more: artifact(base, tmp_path / f"{seed}.safetensors", seed=seed, **more).read_bytes()


@pytest.fixture(autouse=True)
def the_store_is_emptied_and_holds_no_other_files(server):
    yield
    for variant in listed(server):
        server.http.delete(f"/v1/variants/{variant}").raise_for_status()
    assert {name for name in server.files() if not name.startswith("profiles/")} == set()


def put(server: Running, name: str, content: bytes, **more) -> dict:
    response = server.http.put(f"/v1/variants/{name}", content=content, **more)
    assert response.status_code == 201, response.text
    return response.json()


def refused(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == code, response.text
    return response.json()["error"]["message"]


def listed(server: Running) -> list[str]:
    return [one["id"] for one in server.http.get("/v1/variants").json()["data"]]


def ask(server: Running, model: str) -> httpx.Response:
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return server.http.post("/v1/completions", json=body)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_an_upload_is_answered_with_a_receipt(server, base, made):
    content = made()
    receipt = put(server, "team/reviews", content)
    created = receipt.pop("created")
    assert receipt == {
        "id": "team/reviews",
        "object": "variant",
        "version": 1,
        "digest": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
        "base": fingerprint(open_checkpoint(base)),
        "base_matches": True,
        "profile": None,
        "tensors_applied": 1,
        "tensors_total": 1,
        "quality": None,
        "uploaded_by": None,
        "tier": "store",
        "pinned": False,
    }
    assert server.http.get("/v1/variants").json()["data"] == [receipt | {"created": created}]
    one = server.http.get("/v1/variants/team/reviews").json()
    assert one["current"] == one["versions"][0] == receipt | {"created": created}
    assert text(ask(server, "team/reviews")) != text(ask(server, "base"))


def test_curl_uploads_a_file(server, base, tmp_path):
    file = artifact(base, tmp_path / "file.safetensors")
    command = ["curl", "-sS", "--fail-with-body", "-T", str(file), f"{server.url}/v1/variants/by-curl"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["digest"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_checksums_that_match_are_accepted(server, made):
    content = made()
    digest = hashlib.sha256(content)
    encoded = base64.b64encode(digest.digest()).decode()
    headers = {"X-Checksum-Sha256": digest.hexdigest().upper(), "Repr-Digest": f"sha-256=:{encoded}:"}
    put(server, "v", content, headers=headers, params={"digest": digest.hexdigest()})


def test_a_form_with_an_artifact_is_the_same(server, made):
    sent = server.http.post("/v1/variants", data={"name": "v"}, files={"artifact": made()})
    assert sent.status_code == 201, sent.text
    assert sent.json()["digest"] == hashlib.sha256(made()).hexdigest()


def test_a_lora_folder_is_encoded_on_arrival(server, base, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "lora")
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = [("adapter", (name, (tmp_path / "lora" / name).read_bytes())) for name in names]
    sent = server.http.post("/v1/variants", data={"name": "lora"}, files=files)
    assert sent.status_code == 201, sent.text
    assert sent.json()["tensors_applied"] == 2
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert text(ask(server, "lora")) == server.app.state.engine.tokenizer.decode(expected[0, 3:])


def test_a_new_upload_is_a_new_version_which_requests_get(server, made):
    first = put(server, "v", made(1))
    before = text(ask(server, "v"))
    second = put(server, "v", made(2))
    assert (first["version"], second["version"]) == (1, 2)
    assert text(ask(server, "v")) != before
    versions = server.http.get("/v1/variants/v").json()["versions"]
    assert [one["digest"] for one in versions] == [second["digest"], first["digest"]]
    assert put(server, "v", made(1))["version"] == 1
    assert text(ask(server, "v")) == before


def test_e_unknown_model_a_deleted_variant_is_gone_everywhere(server, made):
    put(server, "team/v", made())
    assert text(ask(server, "team/v"))
    assert server.http.delete("/v1/variants/team/v").json() == {"id": "team/v", "object": "variant", "deleted": True}
    for response in (
        ask(server, "team/v"),
        server.http.get("/v1/variants/team/v"),
        server.http.delete("/v1/variants/team/v"),
        server.http.get("/v1/models/team/v"),
    ):
        error = response.json()["error"]
        assert response.status_code == 404
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "model_not_found")


@pytest.mark.parametrize("name", ["base", "a b", ".hidden", "x" * 129, "a//b"])
def test_a_name_that_no_variant_can_have_is_refused_before_the_body(server, name):
    refused(server.http.put(f"/v1/variants/{name}", content=b"x"), 400, "invalid_name")


def test_b_cut_short_a_damaged_uploads_are_refused(server, made):
    content = made()
    for damaged in (content[:-100], content + b"\0" * 16, b"", b"{}", content[:4]):
        message = refused(server.http.put("/v1/variants/v", content=damaged), 400, "corrupt_artifact")
        assert str(server.store) not in message
    flipped = bytearray(content)
    flipped[-50] ^= 1
    checksum = {"X-Checksum-Sha256": hashlib.sha256(content).hexdigest()}
    refused(server.http.put("/v1/variants/v", content=bytes(flipped), headers=checksum), 400, "upload_incomplete")


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped"])
def test_b_cut_short_b_a_file_damaged_on_disk_fails_its_own_requests_alone(server, made, damage):
    content = made(5)
    put(server, "good", made(6))
    receipt = put(server, "broken", content)
    flipped = bytearray(content)
    flipped[-50] ^= 1
    file = server.app.state.blobs.path(receipt["digest"])
    file.unlink()
    file.write_bytes({"cut": content[:-100], "longer": content + b"\0" * 16, "flipped": bytes(flipped)}[damage])
    with ThreadPoolExecutor(3) as pool:
        broken, good, base = pool.map(lambda name: ask(server, name), ("broken", "good", "base"))
    assert (good.status_code, base.status_code) == (200, 200)
    assert broken.status_code == 500
    message = broken.json()["error"]["message"]
    assert "broken" in message
    assert "damaged" in message
    put(server, "broken", content)
    assert text(ask(server, "broken"))


def test_an_artifact_of_another_base_is_refused(server, made):
    message = refused(server.http.put("/v1/variants/v", content=made(base="a" * 64)), 409, "base_mismatch")
    assert "a" * 12 in message


def test_pickles_are_refused(server, tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "model.bin")
    for content in ((tmp_path / "model.bin").read_bytes(), pickle.dumps({"x": 1})):
        assert "pickle" in refused(server.http.put("/v1/variants/v", content=content), 400, "unsupported_artifact")


def test_an_artifact_that_changes_nothing_or_fits_nowhere_is_refused(server, made):
    stray = dense_part("no.such.weight", torch.ones(2, 2))
    wrong = dense_part("model.layers.0.mlp.up_proj.weight", torch.ones(2, 2))
    for parts, said in (([], "changes nothing"), ([stray], "no.such.weight"), ([wrong], "up_proj")):
        sent = server.http.put("/v1/variants/v", content=made(parts=parts))
        assert said in refused(sent, 400, "unsupported_artifact")


def test_a_missing_profile_is_refused_with_the_way_to_send_it(server, base, made, tmp_path):
    profile = write_profile(tmp_path, fingerprint(open_checkpoint(base)), {"x": torch.rand(32)}, {"w": "x"}, "a test")
    file = tmp_path / file_name(profile.digest)
    content, address = made(profile=profile.digest), f"/v1/profiles/{profile.digest}"
    assert address in refused(server.http.put("/v1/variants/v", content=content), 409, "profile_missing")
    assert server.http.head(address).status_code == 404
    wrong = f"/v1/profiles/{'0' * 64}"
    refused(server.http.put(wrong, content=file.read_bytes()), 400, "upload_incomplete")
    refused(server.http.put(address, content=file.read_bytes()[:-1]), 400, "upload_incomplete")
    subprocess.run(["curl", "-sS", "--fail-with-body", "-T", str(file), server.url + address], check=True)
    assert server.http.head(address).status_code == 200
    assert server.http.get(address).content == file.read_bytes()
    assert put(server, "v", content)["profile"] == profile.digest
    server.http.delete("/v1/variants/v")
    assert server.http.head(address).status_code == 200


def test_a_profile_of_another_base_is_refused(server, tmp_path):
    profile = write_profile(tmp_path, "c" * 64, {"x": torch.rand(32)}, {"w": "x"}, "a test")
    content = (tmp_path / file_name(profile.digest)).read_bytes()
    refused(server.http.put(f"/v1/profiles/{profile.digest}", content=content), 409, "base_mismatch")


def test_what_a_request_holds_outlives_its_variant(server, made):
    receipt = put(server, "v", made(7))
    with server.app.state.blobs.hold(receipt["digest"]) as path:
        server.http.delete("/v1/variants/v").raise_for_status()
        assert path.exists()
        put(server, "v", made(8))
    server.http.delete("/v1/variants/v").raise_for_status()
    assert not path.exists()
