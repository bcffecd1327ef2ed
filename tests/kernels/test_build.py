"""The compiled library and the Triton folder work as installed."""

import os
import subprocess
import sys

import pytest

from deltaserve.kernels.cpu import library


def test_the_compiled_library_loads_and_has_this_interface():
    assert library.library().deltaserve_abi_version() == library.ABI_VERSION


def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(library, "ABI_VERSION", 999)
    library.library.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="needs 999; reinstall"):
            library.library()
    finally:
        library.library.cache_clear()


def test_triton_runs_in_its_interpreter():
    code = """
import torch
from deltaserve.kernels.triton.kernels import add_
target, addend = torch.arange(2000.0), torch.ones(2000)
add_(target, addend)
assert torch.equal(target, torch.arange(2000.0) + 1)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
