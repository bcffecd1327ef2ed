"""A model of which one layer at a time is in memory while text runs through it.

All samples go through a layer before the next one is read, so each weight is read once, however many samples there are.
Each sample has a coroutine of its own, in which transformers' own forward runs, whatever that does between layers; it
stops before each layer until the weights are there. So all numbers are those of the whole model, bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.heap import give_back
from deltaserve.delta_store.plain_model import model_without_weights
from deltaserve.delta_store.running.weights import ModelWeights
from deltaserve.delta_store.text import Sample

T = TypeVar("T")


class Layerwise:
    """Takes, in float32: one layer, and four of its largest tensor while that is read; one layer's activations for one
    sample; and all samples' hidden states between two layers. Embedding, norm and head each count as a layer."""

    @torch.inference_mode()
    def run(
        self,
        weights: ModelWeights,
        samples: Sequence[Sample],
        look: Callable[[Any, Sample], T],
        progress: Callable[[int, int], None] = lambda done, total: None,
        inside: Callable[[Any], AbstractContextManager[None]] = nullcontext,
    ) -> list[T]:
        """What ``look`` makes of the model, which it may only call, and each sample. ``progress`` counts layers.

        All of it happens within ``inside`` of the model. Raises OptionError for a model that uses weights outside of
        the layers that hold them.
        """
        model = model_without_weights(weights.architecture, weights.config)
        _fill_buffers(model, weights)
        paths = {layer: path for path, layer in _layers(model)}
        for layer in paths:
            layer.register_forward_pre_hook(_wait)
        runs = [greenlet(look) for _ in samples]
        with inside(model), _explained(weights):
            states: list[Any] = [run.switch(model, sample) for run, sample in zip(runs, samples, strict=True)]
            done = 0
            while not all(run.dead for run in runs):
                progress(min(done, len(paths) - 1), len(paths))
                done += 1
                layer = next(state for run, state in zip(runs, states, strict=True) if not run.dead)
                with _weights_in(layer, paths[layer], weights):
                    states = [run.switch() if at is layer else at for run, at in zip(runs, states, strict=True)]
        return states


def _wait(layer: nn.Module, _: Any) -> None:
    """Leave the sample's coroutine: ``switch`` there returns the layer, and comes back here once it is called again."""
    getcurrent().parent.switch(layer)


def _layers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What is read as one: the items of lists, which decoder layers are, and beside them what has parameters itself."""
    for name, child in module.named_children():
        if isinstance(module, nn.ModuleList) or child._parameters:
            yield path + name, child
        else:
            yield from _layers(child, f"{path}{name}.")


@contextmanager
def _weights_in(layer: nn.Module, path: str, weights: ModelWeights) -> Iterator[None]:
    """Every module has its own entry replaced, so a tied weight is read wherever it is used."""
    held = [
        (module, name, parameter, f"{path}.{inner}.{name}" if inner else f"{path}.{name}")
        for inner, module in layer.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    try:
        for module, name, _, full_name in held:
            module._parameters[name] = nn.Parameter(weights.read(full_name), requires_grad=False)
            give_back()  # what decoding one tensor took, before the next one is decoded
        yield
    finally:
        for module, name, parameter, _ in held:
            module._parameters[name] = parameter
        give_back()


def _fill_buffers(model: Any, weights: ModelWeights) -> None:
    """Those that checkpoints hold; the others, as rotary frequencies, come from the configuration."""
    for name, buffer in model.named_buffers():
        if name in weights.architecture.shapes:
            buffer.copy_(weights.read(name))


@contextmanager
def _explained(weights: ModelWeights) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch says NotImplementedError, which is one, of tensors without data
        if "meta" not in str(error):
            raise
        raise OptionError(
            f"{weights.architecture.name} uses weights outside of the layers that hold them, so it can only run with "
            "all of them in memory: measure with memory whole"
        ) from error
