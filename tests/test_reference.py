"""docs/reference.md says what the server's OpenAPI schema says."""

import runpy
from pathlib import Path

GENERATOR = Path(__file__).parents[1] / "docs" / "generate_reference.py"


def test_the_reference_is_current():
    made = runpy.run_path(str(GENERATOR))
    assert made["FILE"].read_text() == made["reference"](), "run python docs/generate_reference.py"
