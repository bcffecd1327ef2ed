"""Choose the backend that runs the operations; one that is asked for by name and missing is an error."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from deltaserve.kernels import reference
from deltaserve.kernels.cpu import library
from deltaserve.kernels.cpu.operations import CpuBackend
from deltaserve.kernels.parts import Delta
from deltaserve.kernels.segments import Table
from deltaserve.kernels.weights import Weight

logger = logging.getLogger(__name__)


class Prepared(Protocol):
    """A delta in a backend's own layout."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


class Layers(Protocol):
    """Linear layers that read the same input, as a backend keeps them, and what each slot adds to them."""

    def install(self, layer: int, slot: int, prepared: Any | None) -> None: ...
    def install_bias(self, layer: int, slot: int, bias: Tensor | None) -> None: ...
    def bias_delta(self, layer: int, slot: int) -> Tensor | None: ...


class Backend(Protocol):
    """The operations, as ``reference.py`` defines them, for tensors on ``device``.

    ``segments`` are ``Segments``, or what the backend's ``tiles`` made where it has such a table; None: no variants.
    """

    @property
    def NAME(self) -> str: ...  # noqa: N802
    @property
    def device(self) -> torch.device: ...
    def prepare(self, delta: Delta) -> Any: ...
    def one_variant(self) -> AbstractContextManager[Callable[[Delta], Any]]: ...
    def slots(self, prepared: Sequence[Any]) -> Any: ...
    def tiles(self, rows: int, slots: int, runs: int | None = None) -> Table | None: ...
    def layers(self, weights: Sequence[Weight], slots: int, *, copies: bool = False) -> Layers: ...
    def linear(self, x: Tensor, layers: Any, segments: Any) -> list[Tensor]: ...
    def linear_(self, y: Tensor, x: Tensor, layers: Any, segments: Any) -> None: ...
    def delta_linear_(self, y: Tensor, x: Tensor, bank: Sequence[Any], segments: Any) -> None: ...
    def delta_embedding_(self, y: Tensor, ids: Tensor, bank: Sequence[Any], segments: Any) -> None: ...
    def rms_norm(self, x: Tensor, table: Tensor, places: Tensor | None, epsilon: float, offset: float) -> Tensor: ...
    def swap_in_(self, weight: Tensor, delta: Delta) -> Any: ...
    def swap_out_(self, weight: Tensor, token: Any) -> None: ...
    def swap_in_all_(self, weights: Sequence[Tensor], deltas: Sequence[Any]) -> Any: ...
    def swap_out_all_(self, weights: Sequence[Tensor], token: Any) -> None: ...


def _compiled() -> dict[str, Backend]:
    """The compiled backends that this machine can run, fastest first; none where the library was not built.

    One that was built and does not load is an error: nobody should be served slowly without knowing.
    """
    try:
        names = library.instruction_sets()
    except RuntimeError as error:
        logger.warning("Only the slow reference kernels are available: %s", error)
        return {}
    return {f"cpu-{name}": CpuBackend(name) for name in names}


BACKENDS: dict[str, Backend] = {**_compiled(), "reference": reference}
"""Those for tensors on the CPU, fastest first."""


@cache
def _triton() -> Backend:
    """The GPU's backend; loaded when asked for by name, since importing Triton takes a second."""
    try:
        from deltaserve.kernels.triton.operations import TritonBackend
    except ModuleNotFoundError as error:
        raise RuntimeError("The triton kernels need the package triton: pip install 'deltaserve[gpu]'") from error
    return TritonBackend()


def backend(name: str = "auto", device: str = "cpu") -> Backend:
    """The backend of this name, or for ``auto`` the fastest one here for a model on ``device``, cpu or cuda.

    Raises ValueError, with the known names, for any other; RuntimeError for ``triton`` where it cannot run.
    """
    if name == "triton" or (name == "auto" and device == "cuda"):
        return _triton()
    if name == "auto":
        return next(iter(BACKENDS.values()))
    if name not in BACKENDS:
        raise ValueError(f"Unknown kernel backend {name!r}; known are: auto, {', '.join(BACKENDS)}, triton")
    return BACKENDS[name]
