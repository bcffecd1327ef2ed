"""What many tests of compression begin with."""

from pathlib import Path

import pytest
from tiny_models import save, tiny_llama


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tied model with its tokenizer."""
    return save(tiny_llama(), tmp_path_factory.mktemp("base"), vocab=64)
