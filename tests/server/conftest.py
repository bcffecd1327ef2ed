"""A tiny base, and a server of it."""

import pytest
from running_server import running
from tiny_models import save, tiny_llama


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a model that is served as ``base``."""
    return save(tiny_llama(), tmp_path_factory.mktemp("models") / "base", vocab=64)


@pytest.fixture(scope="module")
def server(base, tmp_path_factory):
    """With a store that a module's tests share, and empty."""
    with running(base, tmp_path_factory.mktemp("store")) as server:
        yield server
