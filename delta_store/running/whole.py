"""A model that is in memory as a whole while text runs through it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from deltaserve.delta_store.running.weights import ModelWeights
from deltaserve.delta_store.text import Sample

T = TypeVar("T")


class Whole:
    """Takes the memory of one model in float32. It stays for the next run, which writes its own weights into it."""

    def __init__(self) -> None:
        self._model: Any = None
        self._form: tuple[object, ...] | None = None

    @torch.inference_mode()
    def run(
        self,
        weights: ModelWeights,
        samples: Sequence[Sample],
        look: Callable[[Any, Sample], T],
        progress: Callable[[int, int], None] = lambda done, total: None,
        inside: Callable[[Any], AbstractContextManager[None]] = nullcontext,
    ) -> list[T]:
        """What ``look`` makes of the model and each sample. ``progress`` counts samples.

        All of it happens within ``inside`` of the model.
        """
        self._load(weights)
        found = []
        with inside(self._model):
            for done, sample in enumerate(samples):
                progress(done, len(samples))
                found.append(look(self._model, sample))
        return found

    def _load(self, weights: ModelWeights) -> None:
        form = (weights.architecture.name, weights.config.to_dict())
        if form != self._form:
            self._model = None  # before there is another
            self._model, self._form = weights.model(), form
            return
        held = self._model.state_dict()
        for name, tensor in weights.tensors():
            held[name].copy_(tensor)
