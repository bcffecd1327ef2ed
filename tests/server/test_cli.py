"""The command line against a real server: data on stdout, a user's error one line on stderr and status 1."""

import json
import signal
import socket
import subprocess

import pytest
import torch
from peft import LoraConfig, get_peft_model
from running_server import ENVIRONMENT, artifact, serving
from tiny_models import tiny_llama

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.fingerprint import fingerprint
from deltaserve.delta_store.profile import file_name, write_profile
from deltaserve.server.cli import COMMANDS
from deltaserve.server.settings import Settings


def test_push_list_and_remove(deltaserve, server, base, tmp_path):
    file = artifact(base, tmp_path / "file.safetensors")
    code, out, err = deltaserve("push", file, "--name", "team/v", "--url", f"{server.url}/v1/")
    assert (code, out.startswith("team/v: version 1, ")) == (0, True)
    assert "100%" in err or "file.safetensors" in err
    code, out, _ = deltaserve("list", "--url", server.url)
    assert code == 0
    assert "team/v" in out
    code, out, _ = deltaserve("list", "--url", server.url, "--json")
    assert [one["id"] for one in json.loads(out)] == ["team/v"]
    code, out, _ = deltaserve("remove", "team/v", "--url", server.url)
    assert (code, out) == (0, "removed team/v\n")
    code, out, err = deltaserve("remove", "team/v", "--url", server.url)
    assert (code, out) == (1, "")
    assert err.startswith("Error: There is no variant 'team/v'")
    assert err.count("\n") == 1


@pytest.mark.parametrize("given", [True, False])
def test_push_sends_the_profile_first_where_the_server_lacks_it(deltaserve, server, base, tmp_path, given):
    values = {"x": torch.rand(32)}
    where = tmp_path / "elsewhere" if given else tmp_path
    profile = write_profile(where, fingerprint(open_checkpoint(base)), values, {"w": "x"}, f"given {given}")
    file = artifact(base, tmp_path / "file.safetensors", profile=profile.digest)
    options = ("--profile", where / file_name(profile.digest)) if given else ()
    code, out, err = deltaserve("push", file, "--name", "v", "--url", server.url, "--json", *options)
    assert code == 0, err
    assert json.loads(out)["profile"] == profile.digest
    assert server.http.head(f"/v1/profiles/{profile.digest}").status_code == 200


def test_push_names_a_profile_that_it_cannot_find(deltaserve, server, base, tmp_path):
    file = artifact(base, tmp_path / "file.safetensors", profile="e" * 64)
    code, out, err = deltaserve("push", file, "--name", "v", "--url", server.url)
    assert (code, out) == (1, "")
    assert "eeee" in err
    assert "--profile" in err


def test_push_takes_a_lora_folder(deltaserve, server, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora")
    code, out, err = deltaserve("push", tmp_path / "lora", "--name", "lora", "--url", server.url, "--json")
    assert code == 0, err
    assert json.loads(out)["tensors_applied"] == 2
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    code, _, err = deltaserve("push", tmp_path / "lora", "--name", "lora", "--url", server.url)
    assert code == 1
    assert "adapter_model.safetensors is missing" in err


def test_what_the_server_refuses_is_said_in_one_line(deltaserve, server, base, tmp_path):
    file = artifact(base, tmp_path / "other.safetensors", base="a" * 64)
    code, out, err = deltaserve("push", file, "--name", "v", "--url", server.url)
    assert (code, out) == (1, "")
    assert "Error: " in err
    assert "aaaaaaaaaaaa" in err


def test_a_push_to_no_server_is_one_line(deltaserve, base, tmp_path):
    file = artifact(base, tmp_path / "v.safetensors")
    code, out, err = deltaserve("push", file, "--name", "v", "--url", "http://127.0.0.1:9")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "is `deltaserve serve` running there?" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("push", "no-such-file", "--name", "v"), "no-such-file"),
        (("list", "--url", "http://127.0.0.1:9"), "is `deltaserve serve` running there?"),
        (("list", "--url", "nonsense"), "nonsense"),
        (("remove", "v", "--url", "http://127.0.0.1:9"), "is `deltaserve serve` running there?"),
        (("bench", "http://127.0.0.1:9"), "is a server there?"),
        (("inspect", "no-such-file"), "no-such-file"),
        (("merge", "no-such-folder", "no-such-file", "--output", "merged"), "no-such-f"),
        (("serve", "x", "--max-wait-seconds", "0"), "DELTASERVE_MAX_WAIT_SECONDS"),
        (("serve",), "DELTASERVE_BASE"),
        (("serve", "no-such-folder", "--port", "0"), "no-such-folder"),
        (("serve", "x", "--port", "many"), "DELTASERVE_PORT"),
    ],
)
def test_a_users_error_is_one_line_and_status_1(deltaserve, monkeypatch, tmp_path, arguments, said):
    monkeypatch.setenv("DELTASERVE_STORE", str(tmp_path))
    code, out, err = deltaserve(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nonsense",), "No such command 'nonsense'"),
        (("list", "--nonsense"), "No such option: --nonsense"),
        (("inspect",), "Missing argument"),
        (("push", "file"), "Missing option '--name'"),
        (("bench", "http://127.0.0.1:9", "--requests", "0"), "Invalid value for '--requests'"),
    ],
)
def test_a_command_that_is_written_wrong_is_status_2_and_says_where_help_is(deltaserve, arguments, said):
    code, out, err = deltaserve(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "--help' for help" in err
    assert "Traceback" not in err


def test_a_taken_port_is_said_before_the_base_is_loaded(deltaserve, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = deltaserve("serve", "no-such-folder", "--port", port, "--store", tmp_path)
    assert code == 1
    assert f"127.0.0.1:{port}" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_an_example(deltaserve, command):
    code, out, _ = deltaserve(command, "--help")
    assert code == 0
    assert "Example" in out
    if command != "serve":
        assert command in ("merge", "compress") or "--json" in out


def test_every_setting_is_a_flag_of_serve(deltaserve, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = deltaserve("serve", "--help")
    for name in set(Settings.model_fields) - {"base"}:
        assert f"--{name.replace('_', '-')} " in out


def test_version(deltaserve):
    code, out, _ = deltaserve("--version")
    assert (code, out.split()[0]) == (0, "deltaserve")


def test_serve_prints_a_curl_line_that_works_and_ends_cleanly(base, tmp_path):
    with serving(base, tmp_path / "store", "--served-name", "model", "--host", "127.0.0.1") as (url, process):
        line = f"curl -sS --fail-with-body {url}/v1/chat/completions -H 'Content-Type: application/json' " + (
            """-d '{"model": "model", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}'"""
        )
        asked = subprocess.run(line, shell=True, capture_output=True, text=True, env=ENVIRONMENT, check=True)
        assert json.loads(asked.stdout)["model"] == "model"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
