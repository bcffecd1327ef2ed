"""The compiled library works as installed."""

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
