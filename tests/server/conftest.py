"""A tiny base, a server of it, and the command line."""

import sys

import pytest
from running_server import running
from tiny_models import save, tiny_llama

from deltaserve.server.cli import main


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a model that is served as ``base``."""
    return save(tiny_llama(), tmp_path_factory.mktemp("models") / "base", vocab=64)


@pytest.fixture(scope="module")
def server(base, tmp_path_factory):
    """With a store that a module's tests share, and empty."""
    with running(base, tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture
def deltaserve(monkeypatch, capfd, tmp_path):
    """Run a command; returns its exit status, stdout and stderr."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deltaserve", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run
