"""Choose the backend that runs the operations; one that is asked for by name and missing is an error."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from deltaserve.kernels import reference
from deltaserve.kernels.parts import Delta
from deltaserve.kernels.segments import Segments


class Prepared(Protocol):
    """A delta in a backend's own layout."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


class Backend(Protocol):
    """The operations, as ``reference.py`` defines them."""

    @property
    def NAME(self) -> str: ...  # noqa: N802
    def prepare(self, delta: Delta) -> Any: ...
    def delta_linear_(self, y: Tensor, x: Tensor, bank: Sequence[Any], segments: Segments) -> None: ...
    def delta_embedding_(self, y: Tensor, ids: Tensor, bank: Sequence[Any], segments: Segments) -> None: ...


BACKENDS: dict[str, Backend] = {"reference": reference}


def backend(name: str = "auto") -> Backend:
    """The backend of this name, or the fastest one here for ``auto``.

    Raises ValueError, with the known names, for any other.
    """
    if name == "auto":
        return reference
    if name not in BACKENDS:
        raise ValueError(f"Unknown kernel backend {name!r}; known are: auto, {', '.join(BACKENDS)}")
    return BACKENDS[name]
