"""The compiled CPU library, loaded through ctypes so that it links neither Python nor torch."""

import ctypes
from functools import cache
from importlib.resources import files
from pathlib import Path

ABI_VERSION = 1


@cache
def library() -> ctypes.CDLL:
    """The library that was built with this installation.

    Raises RuntimeError if it is missing or was built from another version of the sources.
    """
    folder = files("deltaserve.kernels.cpu")
    found = [Path(str(entry)) for entry in folder.iterdir() if entry.name.startswith("libdeltaserve_cpu.")]
    if not found:
        raise RuntimeError(
            "The compiled CPU kernels are missing from this installation; run: pip install --force-reinstall ."
        )
    loaded = ctypes.CDLL(str(found[0]))
    version = loaded.deltaserve_abi_version()
    if version != ABI_VERSION:
        raise RuntimeError(
            f"{found[0].name} has interface {version}, this code needs {ABI_VERSION}; reinstall deltaserve"
        )
    return loaded
