"""How the tests are run: Triton's interpreter where there is no GPU, and the longest tests first."""

import os

import pytest
import torch

# It must be chosen before anything (peft does) imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

LONGEST = ("end_to_end", "deploy")
"""Folders whose tests take minutes: begun last, they would leave the other workers without work."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in LONGEST)
