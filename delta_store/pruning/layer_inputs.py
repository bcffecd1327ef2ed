"""Run text through the full fine-tune and look at the inputs of each linear layer beside its delta."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from deltaserve.delta_store.calibration import body_outputs, watching
from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.text import Sample

Look = Callable[[str, Tensor, Tensor], None]
"""Called with a parameter's name, the layer's inputs ``[tokens, in]``, and its delta ``[in, out]``."""


def look_at_inputs(
    run: Callable[..., Any], base: Checkpoint, names: Collection[str], samples: Sequence[Sample], look: Look
) -> None:
    """Have ``look`` called for each sample and each of ``names`` that it reaches, one after the other.

    ``run`` is a runner's (``running/``), of the full fine-tune.
    """

    def inside(model: Any) -> AbstractContextManager[None]:
        layers = {module: name for name, module in model.named_modules() if f"{name}.weight" in names}
        modules = {name: module for module, name in layers.items()}

        def inputs_of(layer: str, inputs: Tensor) -> None:
            name = f"{layer}.weight"
            delta = modules[layer].weight - base.read(base.held_as(name)).float()
            transposed = name in base.architecture.transposed
            look(name, inputs.reshape(-1, inputs.shape[-1]), delta if transposed else delta.T)

        return watching(layers, inputs_of)

    run(samples, body_outputs, inside=inside)
