"""A running server for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine
from scripted_service import Service, serving


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A context of 64 tokens, and places for more requests than a test sends."""
    with serving(tmp_path, ScriptedEngine()) as running:
        yield running
