"""The compiled CPU library, loaded through ctypes so that it links neither Python nor torch."""

import ctypes
from ctypes import c_char_p, c_float, c_int32, c_int64, c_uint32, c_void_p
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

# Before the library, which uses OpenMP: its libgomp.so.1 is then torch's own, already loaded, and the process has one.
import torch  # noqa: F401

ABI_VERSION = 7
INSTRUCTION_SETS = ("avx512", "avx2", "neon", "portable")
"""Fastest first."""

_MATRIX: list[Any] = [c_void_p, c_int64, c_int64, c_int64, c_int32]
_TABLE: list[Any] = [c_void_p, c_void_p, c_int64]
_SEGMENTS: list[Any] = [c_void_p, c_int64, *_TABLE]


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
    loaded.deltaserve_operations.restype = c_void_p
    loaded.deltaserve_operations.argtypes = [c_char_p]
    loaded.deltaserve_linear.argtypes = [c_void_p, c_void_p, c_int64, *_MATRIX, *_MATRIX, *_TABLE]
    loaded.deltaserve_embedding.argtypes = [c_void_p, *_MATRIX, c_void_p, *_SEGMENTS]
    pointer, count, number = c_void_p, c_int64, c_float
    loaded.deltaserve_rms_norm.argtypes = [
        *(pointer, pointer, pointer, count, count, count, pointer, count, pointer, number, number)
    ]
    loaded.deltaserve_attend.argtypes = [pointer, pointer, pointer, pointer, pointer, count]
    loaded.deltaserve_decode.argtypes = [pointer, pointer, count, pointer, pointer, count]
    loaded.deltaserve_swap.argtypes = [c_void_p, c_void_p, c_int64, c_int32]
    key = c_uint32, c_uint32
    loaded.deltaserve_uniform_columns.argtypes = [*key, count, count, count, pointer]
    loaded.deltaserve_weighted_columns.argtypes = [pointer, *key, count, count, count, pointer, pointer]
    loaded.deltaserve_keep_columns.argtypes = [pointer, count, count, count, pointer]
    return loaded


def instruction_sets() -> tuple[str, ...]:
    """Those that this machine and this build have, fastest first."""
    return tuple(name for name in INSTRUCTION_SETS if library().deltaserve_operations(name.encode()))


def operations(instruction_set: str) -> c_void_p:
    """The table of operations compiled for an instruction set; RuntimeError if this machine or build has it not."""
    if (table := library().deltaserve_operations(instruction_set.encode())) is None:
        raise RuntimeError(
            f"This machine cannot run the CPU kernels for {instruction_set!r}; it can: {', '.join(instruction_sets())}"
        )
    return c_void_p(table)
