"""The compose file, the Dockerfile and what they mount name only what exists; no Docker engine is needed for that."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer
import yaml

from deltaserve.server.api import operations
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
def stages(instructions: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, with those of the stages that it is built on."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, words in instructions:
        if name == "FROM":
            parent, _, stage = words.split()
            found[stage] = list(found.get(parent, []))
        else:
            found[stage].append((name, words))
    return found


@pytest.fixture(scope="module")
def prometheus() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text()))


@pytest.fixture(scope="module")
def source() -> dict[str, Any]:
    """Grafana's only data source."""
    file = ROOT / "deploy" / "grafana" / "provisioning" / "datasources" / "prometheus.yml"
    (found,) = yaml.safe_load(file.read_text())["datasources"]
    return dict(found)


@pytest.fixture(scope="module")
def environment(server: dict[str, Any], stages: dict[str, list[tuple[str, str]]]) -> dict[str, str]:
    """What a server in the container finds: the image's variables, then those of compose."""
    stage = stages[server["build"]["target"]]
    words = [word for name, words in stage if name == "ENV" for word in shlex.split(words)]
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


def test_image_builds_what_the_package_is_made_of(stages: dict[str, list[tuple[str, str]]]) -> None:
    copied = " ".join(words for name, words in stages["wheel"] if name == "COPY")
    for folder in ("kernels", "delta_store", "server"):
        assert re.search(rf"\b{folder} {folder}\b", copied)


@pytest.mark.parametrize(("target", "torch"), [("cpu", "cpu"), ("cuda", "cu130")])
def test_targets_install_a_pinned_torch_and_the_package(
    stages: dict[str, list[tuple[str, str]]], target: str, torch: str
) -> None:
    assert re.search(r"(?m)^torch==", (ROOT / "constraints.txt").read_text())
    installs = [words for name, words in stages[target] if name == "RUN" and "pip install" in words]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in install for install in installs)
    assert f"https://download.pytorch.org/whl/{torch} torch" in installs[0]
    extras = re.search(r"/wheels/\*\.whl\)\[(.+)\]", installs[1])
    assert extras
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"blobs", "redis"} <= set(extras[1].split(",")) <= set(known)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_server_does_not_run_as_root(stages: dict[str, list[tuple[str, str]]], target: str) -> None:
    assert [words for name, words in stages[target] if name == "USER"] == ["deltaserve"]
    assert stages[target][-1] == ("USER", "deltaserve")


def test_what_is_built_without_a_target_is_what_compose_builds(
    server: dict[str, Any], stages: dict[str, list[tuple[str, str]]]
) -> None:
    assert list(stages)[-1] == server["build"]["target"] == "cpu"


def test_environment_is_accepted_by_the_settings(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in environment if name.startswith(PREFIX)]
    assert {name.removeprefix(PREFIX).lower() for name in names} <= set(Settings.model_fields)
    for name in names:
        monkeypatch.setenv(name, environment[name])
    settings = Settings()  # type: ignore[call-arg]  # the base comes from the environment
    assert (settings.base, settings.host) == ("/models/base", "0.0.0.0")


def test_addresses_lead_to_services_and_the_ports_that_they_listen_on(
    compose: dict[str, Any], environment: dict[str, str], prometheus: dict[str, Any], source: dict[str, Any]
) -> None:
    listening = {
        "server": Settings.model_fields["port"].default,
        "redis": 6379,
        "objects": int(re.search(r"-s3\.port=(\d+)", " ".join(compose["services"]["objects"]["command"]))[1]),
        "prometheus": 9090,
    }
    (target,) = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    asked = [*(value for value in environment.values() if re.match(r"(redis|http)://", value)), f"//{target}"]
    asked.append(source["url"])
    addresses = [urlsplit(address) for address in asked]
    assert {address.hostname for address in addresses} == {"server", "redis", "objects", "prometheus"}
    assert {(a.hostname, a.port) for a in addresses} <= set(listening.items())


def test_server_has_the_object_stores_own_keys(compose: dict[str, Any], environment: dict[str, str]) -> None:
    store = compose["services"]["objects"]["environment"]
    assert store == {name: environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    assert "ports" not in compose["services"]["objects"]


def test_only_this_machine_reaches_what_is_published(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:8000:8000", "127.0.0.1:3000:3000"]


def test_images_are_pinned(compose: dict[str, Any]) -> None:
    images = [service["image"] for name, service in compose["services"].items() if name != "server"]
    assert [image for image in images if not re.fullmatch(r"[\w./-]+:v?\d+\.\d+[\w.-]*", image)] == []


def test_port_is_the_settings_default(server: dict[str, Any], instructions: list[tuple[str, str]]) -> None:
    port = Settings.model_fields["port"].default
    assert ("EXPOSE", str(port)) in instructions
    assert server["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_the_server_has_time_to_finish_what_runs(server: dict[str, Any]) -> None:
    assert int(server["stop_grace_period"].removesuffix("s")) > Settings.model_fields["shutdown_seconds"].default


def test_volumes_are_declared_and_files_exist(compose: dict[str, Any]) -> None:
    mounts = [volume for service in compose["services"].values() for volume in service.get("volumes", [])]
    sources = [mount.rpartition(":/")[0].split(":/")[0] for mount in mounts]
    files = [Path(source) for source in sources if source.startswith("./")]
    assert len(files) == 3
    assert [file for file in files if not (ROOT / file).exists()] == []
    named = {source for source in sources if re.fullmatch(r"\w+", source)}
    assert named == set(compose["volumes"])


def test_volume_is_the_store_and_the_base_is_mounted_where_it_is_looked_for(
    compose: dict[str, Any], server: dict[str, Any], environment: dict[str, str]
) -> None:
    mounts = [re.fullmatch(r"(.+?):(/[^:]+)(:ro)?", volume) for volume in server["volumes"]]
    sources = {mount[2]: mount[1] for mount in mounts if mount}
    assert sources[environment["DELTASERVE_STORE"]] in compose["volumes"]
    assert sources[environment["DELTASERVE_BASE"]].startswith("${BASE_MODEL:?")


def test_grafana_finds_its_data_source_and_the_dashboard(compose: dict[str, Any], source: dict[str, Any]) -> None:
    mounts = dict(volume.split(":")[1::-1] for volume in compose["services"]["grafana"]["volumes"])
    folder = ROOT / mounts["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "deltaserve.yml").read_text())["providers"]
    (file,) = [mount for place, mount in mounts.items() if place.startswith(provider["options"]["path"] + "/")]
    dashboard = json.loads((ROOT / file).read_text())
    assert f"/d/{dashboard['uid']}" in (ROOT / "docker-compose.yml").read_text()
    (variable,) = [one for one in dashboard["templating"]["list"] if one["type"] == "datasource"]
    assert variable["query"] == source["type"]
    assert source["isDefault"]


def test_prometheus_scrapes_a_route_that_exists(prometheus: dict[str, Any]) -> None:
    (job,) = prometheus["scrape_configs"]
    assert job["metrics_path"] in {getattr(route, "path", None) for route in operations.router.routes}


def test_command_is_one_of_the_command_lines(server: dict[str, Any], instructions: list[tuple[str, str]]) -> None:
    assert ("ENTRYPOINT", '["deltaserve"]') in instructions
    known = typer.main.get_group(app).commands
    assert server["command"][0] in known


def test_healthcheck_asks_a_route_that_exists(server: dict[str, Any]) -> None:
    asked = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", server["healthcheck"]["test"][-1])
    assert asked
    assert int(asked[1]) == Settings.model_fields["port"].default
    assert asked[2] == "/ready"
    assert asked[2] in {getattr(route, "path", None) for route in operations.router.routes}
