"""vLLM's routes for adapters: by a tool that knows only those, from allowed folders, and by admins alone."""

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from running_server import Running, running
from tiny_models import tiny_llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """``open/lora`` and ``open/other`` are adapters that are allowed, ``closed/lora`` is not."""
    root = tmp_path_factory.mktemp("adapters")
    for name, rank in (("open/lora", 2), ("open/other", 3), ("closed/lora", 2)):
        config = LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(tiny_llama(), config).save_pretrained(root / name)
    (root / "open" / "empty").mkdir()
    (root / "open" / "link").symlink_to(root / "closed" / "lora")
    (root / "open" / "linked").mkdir()
    (root / "open" / "linked" / "adapter_config.json").symlink_to(root / "open" / "lora" / "adapter_config.json")
    (root / "open" / "linked" / "adapter_model.safetensors").symlink_to(
        root / "closed" / "lora" / "adapter_model.safetensors"
    )
    return root


@pytest.fixture(scope="module")
def loading(base, folders, tmp_path_factory):
    with running(base, tmp_path_factory.mktemp("store"), adapter_folders=(str(folders / "open"),)) as server:
        yield server


def load(server: Running, path: object, name: str = "lora", **more: object):
    return server.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)} | more)


def models(server: Running) -> list[str]:
    return [one["id"] for one in server.http.get("/v1/models").json()["data"]]


def test_load_ask_replace_unload(loading: Running, folders: Path) -> None:
    loaded = load(loading, folders / "open" / "lora")
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'lora' added successfully.")
    assert models(loading) == ["base", "lora"]
    asked = loading.http.post("/v1/completions", json={"model": "lora", "prompt": "a", "max_tokens": 2})
    assert asked.status_code == 200
    again = load(loading, "other")
    assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")
    assert "load_inplace" in again.json()["error"]["message"]
    assert load(loading, "other", load_inplace=True).status_code == 200
    versions = loading.http.get("/v1/variants/lora").json()["versions"]
    assert len({version["digest"] for version in versions}) == 2
    unload = {"lora_name": "lora"}
    removed = loading.http.post("/v1/unload_lora_adapter", json=unload)
    assert (removed.status_code, removed.text) == (200, "Success: LoRA adapter 'lora' removed successfully.")
    assert models(loading) == ["base"]
    assert loading.http.post("/v1/unload_lora_adapter", json=unload).status_code == 404


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("{root}/closed/lora", 403, "DELTASERVE_ADAPTER_FOLDERS"),
        ("{root}/open/../closed/lora", 403, "DELTASERVE_ADAPTER_FOLDERS"),
        ("../closed/lora", 403, "DELTASERVE_ADAPTER_FOLDERS"),
        ("{root}/open/link", 403, "DELTASERVE_ADAPTER_FOLDERS"),
        ("{root}/open/nothing", 403, "DELTASERVE_ADAPTER_FOLDERS"),
        ("a\0b", 403, "DELTASERVE_ADAPTER_FOLDERS"),
        ("x" * 5000, 403, "DELTASERVE_ADAPTER_FOLDERS"),
        ("{root}/open/empty", 400, "adapter_config.json"),
        ("{root}/open/linked", 400, "adapter_model.safetensors"),
        ("", 400, "lora_path"),
    ],
)
def test_no_other_folder_is_read(loading: Running, folders: Path, path: str, status: int, said: str) -> None:
    refused = load(loading, path.format(root=folders))
    assert refused.status_code == status, refused.text
    assert said in refused.json()["error"]["message"]
    assert models(loading) == ["base"]


def test_names_and_fields_are_checked(loading: Running) -> None:
    assert load(loading, "lora", "base").json()["error"]["code"] == "invalid_name"
    assert load(loading, "lora", lora_int_id=3).json()["error"]["code"] == "unknown_parameter"
    body = {"lora_name": "lora", "lora_int_id": 3}
    assert loading.http.post("/v1/unload_lora_adapter", json=body).json()["error"]["code"] == "unsupported_parameter"
    assert models(loading) == ["base"]


def test_without_the_setting_no_folder_is_open(server: Running, folders: Path) -> None:
    refused = load(server, folders / "open" / "lora")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_permissions")


def test_an_admins_key_is_needed(base, folders: Path, tmp_path: Path) -> None:
    with running(base, tmp_path, adapter_folders=(str(folders / "open"),), keys="required") as server:
        server.http.headers["Authorization"] = f"Bearer {server.app.state.keys.create('tenant')[1]}"
        assert load(server, "lora").status_code == 403
        assert server.http.post("/v1/unload_lora_adapter", json={"lora_name": "x"}).status_code == 403
