"""``deltaserve keys`` on a store of its own."""

import json

import pytest


def test_create_list_and_revoke(deltaserve, tmp_path):
    store = ("--store", tmp_path)
    code, text, _ = deltaserve("keys", "create", "--name", "alice", "--models", "a, team/*", *store)
    assert (code, text.startswith("sk-")) == (0, True)
    code, out, _ = deltaserve("keys", "list", "--json", *store)
    (listed,) = json.loads(out)
    assert (listed["name"], listed["role"], listed["models"]) == ("alice", "infer", ["a", "team/*"])
    assert text.strip() not in out
    assert deltaserve("keys", "revoke", listed["id"], *store)[1] == f"revoked alice ({listed['id']})\n"
    assert "alice" in deltaserve("keys", "list", *store)[1]
    code, _, err = deltaserve("keys", "revoke", "nobody", *store)
    assert (code, err.count("\n")) == (1, 1)


@pytest.mark.parametrize("command", ["create", "list", "revoke"])
def test_every_command_has_help_and_an_example(deltaserve, command):
    code, out, _ = deltaserve("keys", command, "--help")
    assert code == 0
    assert "Example" in out
    assert "--json" in out
