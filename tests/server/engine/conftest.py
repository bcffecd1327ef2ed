"""An engine of the lettered variants, that has nothing under way when a test ends."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_variants import serving
from lettered_variants import BASE, VARIANTS

from deltaserve.server.engine.engine import Engine


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with serving(BASE, VARIANTS, tmp_path) as engine:
        yield engine
        assert engine.requests == 0
        assert engine._batching.router.begun == 0
        assert set(engine.bank.holders.values()) <= {0}
