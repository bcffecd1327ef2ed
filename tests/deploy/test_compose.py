"""The compose file and the Dockerfile name only what exists: no Docker engine is needed to see that."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from deltaserve.server.cli import app
from deltaserve.server.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))


@pytest.fixture(scope="module")
def server(compose: dict[str, Any]) -> dict[str, Any]:
    return dict(compose["services"]["server"])


@pytest.fixture(scope="module")
def instructions(server: dict[str, Any]) -> list[tuple[str, str]]:
    """The Dockerfile that compose builds, as (instruction, arguments) with continued lines joined."""
    text = (ROOT / server["build"]["context"] / server["build"]["dockerfile"]).read_text()
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def environment(server: dict[str, Any], instructions: list[tuple[str, str]]) -> dict[str, str]:
    """What a server in the container finds: the image's variables, then those of compose."""
    words = [word for name, words in instructions if name == "ENV" for word in shlex.split(words)]
    image = dict(word.split("=", 1) for word in words)
    return {**image, **{name: str(value) for name, value in server["environment"].items()}}


def ignored(path: Path) -> bool:
    """Whether .dockerignore, which here leaves out everything but the lines with ``!``, keeps a path from the build."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return f"!{path}" not in lines


def test_copied_files_exist_and_reach_the_build(instructions: list[tuple[str, str]]) -> None:
    copies = [words.split()[:-1] for name, words in instructions if name == "COPY" and "--from" not in words]
    sources = [Path(source) for copy in copies for source in copy]
    assert len(sources) >= 8
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if ignored(source)] == []


def test_image_builds_what_the_package_is_made_of(instructions: list[tuple[str, str]]) -> None:
    copied = " ".join(words for name, words in instructions if name == "COPY")
    for folder in ("kernels", "delta_store", "server"):
        assert re.search(rf"\b{folder} {folder}\b", copied)


def test_torch_is_pinned_and_its_build_can_be_chosen(instructions: list[tuple[str, str]]) -> None:
    assert re.search(r"(?m)^torch==", (ROOT / "constraints.txt").read_text())
    assert ("ARG", "TORCH=cpu") in instructions
    installs = [words for name, words in instructions if name == "RUN" and "pip install" in words]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in install for install in installs)


def test_server_does_not_run_as_root(instructions: list[tuple[str, str]]) -> None:
    last_stage = instructions[max(i for i, (name, _) in enumerate(instructions) if name == "FROM") :]
    assert ("USER", "deltaserve") in last_stage


def test_environment_names_are_settings(environment: dict[str, str]) -> None:
    names = {name for name in environment if name.startswith(PREFIX)}
    assert names == {"DELTASERVE_BASE", "DELTASERVE_STORE", "DELTASERVE_HOST", "DELTASERVE_KEYS"}
    assert {name.removeprefix(PREFIX).lower() for name in names} <= set(Settings.model_fields)


def test_environment_is_accepted_by_the_settings(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        if name.startswith(PREFIX):
            monkeypatch.setenv(name, value)
    settings = Settings()  # type: ignore[call-arg]  # the base comes from the environment
    assert (settings.base, settings.host) == ("/models/base", "0.0.0.0")


def test_port_is_the_settings_default(server: dict[str, Any], instructions: list[tuple[str, str]]) -> None:
    port = Settings.model_fields["port"].default
    assert ("EXPOSE", str(port)) in instructions
    assert server["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_volume_is_the_store_and_the_base_is_mounted_where_it_is_looked_for(
    compose: dict[str, Any], server: dict[str, Any], environment: dict[str, str]
) -> None:
    mounts = [re.fullmatch(r"(.+?):(/[^:]+)(:ro)?", volume) for volume in server["volumes"]]
    sources = {mount[2]: mount[1] for mount in mounts if mount}
    assert sources[environment["DELTASERVE_STORE"]] in compose["volumes"]
    assert sources[environment["DELTASERVE_BASE"]].startswith("${BASE_MODEL:?")


def test_command_is_one_of_the_command_lines(server: dict[str, Any], instructions: list[tuple[str, str]]) -> None:
    assert ("ENTRYPOINT", '["deltaserve"]') in instructions
    known = typer.main.get_group(app).commands
    assert server["command"][0] in known


def test_healthcheck_asks_a_route_that_exists(server: dict[str, Any]) -> None:
    from deltaserve.server.api import operations

    asked = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", server["healthcheck"]["test"][-1])
    assert asked
    assert int(asked[1]) == Settings.model_fields["port"].default
    assert asked[2] == "/ready"
    assert asked[2] in {getattr(route, "path", None) for route in operations.router.routes}
