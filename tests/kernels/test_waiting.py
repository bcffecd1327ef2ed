"""Threads that wait awake: said before torch is there, and not against the user's word."""

import json
import os
import subprocess
import sys

SEEN = """
import json, os, sys
from deltaserve.server.commands import {command}
from deltaserve.kernels.waiting import wait_awake
is_early = "torch" not in sys.modules
wait_awake()
print(json.dumps([is_early, os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]]))
"""


def seen(command: str, **variables: str) -> list[object]:
    bare = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    told = subprocess.run(
        [sys.executable, "-c", SEEN.format(command=command)], env=bare | variables, check=True, capture_output=True
    )
    found: list[object] = json.loads(told.stdout)
    return found


def test_it_is_said_before_torch_is_imported() -> None:
    assert seen("serve") == seen("bench") == [True, "active", "10000"]


def test_what_the_user_says_stays() -> None:
    assert seen("serve", OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="7") == [True, "passive", "7"]
