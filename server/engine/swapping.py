"""A variant in the base's own weights, and the way back, bit for bit, whatever happens in between."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltaserve.delta_store.errors import DeltaServeError, EngineDown
from deltaserve.kernels.segments import BASE
from deltaserve.server.engine.wrapped import Fitted, WrappedModel

logger = logging.getLogger(__name__)


class Swapping:
    """Only the generation thread calls it, between steps. ``read`` gives a weight of the base again, ``[out, in]``.

    The backend keeps what it overwrites. Should that not be enough, because a swap stopped half way, ``restore`` finds
    the weights that are not the base's by checksums from the start, and reads those anew.
    """

    def __init__(self, model: WrappedModel, read: Callable[[str], Tensor]) -> None:
        self._model, self._read = model, read
        for weight in model.weights.values():
            _take_over(weight)
        self._sums = {name: _checksum(weight) for name, weight in model.weights.items()}
        self._swapped: tuple[list[Tensor], Any] | None = None

    def swap_in(self, fitted: Fitted, slot: int) -> None:
        """Add the deltas of the version in this slot to the base. If this raises, ``restore`` must follow."""
        names = [name for name in fitted.prepared if name in self._model.weights]
        weights = [self._model.weights[name] for name in names]
        deltas = [fitted.prepared[name] for name in names]
        self._swapped = weights, self._model.backend.swap_in_all_(weights, deltas)
        for layer, parameter in self._model.vectors.values():
            layer.alter(parameter, slot)

    def swap_out(self) -> None:
        """Take out what is in. If this raises, ``restore`` must follow."""
        for layer, parameter in self._model.vectors.values():
            layer.alter(parameter, BASE)
        if self._swapped is not None:
            weights, token = self._swapped
            self._model.backend.swap_out_all_(weights, token)
            self._swapped = None

    @torch.no_grad()
    def restore(self) -> None:
        """Make sure that the base is itself, after whatever failed. Raises EngineDown if it cannot be."""
        try:
            self.swap_out()
        except Exception:  # whatever the backend stumbles over now, the checkpoint has the weights too
            logger.exception("A variant could not be swapped out")
            self._swapped = None
        for name, weight in self._model.weights.items():
            if _checksum(weight) != self._sums[name]:
                logger.warning("%s is not the base's any more and is read from the checkpoint again", name)
                self._reload(name, weight)

    def _reload(self, name: str, weight: Tensor) -> None:
        try:
            weight.copy_(self._read(name))
        except (DeltaServeError, OSError, RuntimeError) as error:
            raise EngineDown(f"The base's {name} was damaged and cannot be read again; restart: {error}") from error
        if _checksum(weight) != self._sums[name]:
            raise EngineDown(f"The base's {name} was damaged and its checkpoint has changed since; restart")


def _take_over(weight: Tensor) -> None:
    """Write every page once: those of a mapped file would be copied one by one during the first swap, in ten times its
    time."""
    weight.view(torch.int16).bitwise_or_(0)


def _checksum(weight: Tensor) -> int:
    return int(torch.hash_tensor(weight).view(torch.int64))
