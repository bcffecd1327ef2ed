"""The commands of docs/replicas.md, run as they stand but for ports and the base's folder."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from redis_servers import free_port
from running_server import ENVIRONMENT, SMALL, artifact
from tiny_models import save, tiny_llama

GUIDE = Path(__file__).parents[1] / "docs" / "replicas.md"


def test_what_is_uploaded_to_one_replica_is_served_by_the_other(tmp_path):
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    base = save(tiny_llama(), tmp_path / "base", vocab=64)
    artifact(base, tmp_path / "reviews.safetensors")
    start, use = re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.S)
    script = start + "echo STARTED\n" + use
    ports = {port: str(free_port()) for port in ("6390", "8001", "8002")}
    for written, port in ports.items():
        assert written in script
        script = script.replace(written, port)
    script = script.replace(" --daemonize yes", " > /dev/null &")  # so that it ends with the test
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    small = {f"DELTASERVE_{name.upper()}": str(value) for name, value in SMALL.items()}
    done = subprocess.run(
        ["bash", "-c", f"trap 'kill $(jobs -p); wait' EXIT; set -e\n{script}"],
        env=ENVIRONMENT | small | {"BASE": str(base), "PATH": programs},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["model"] == "reviews"
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")  # a random model may end at once
