"""Run text through the full fine-tune and look at the inputs of each linear layer beside its delta."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from deltaserve.delta_store.calibration import watching
from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.text import Sample

Look = Callable[[str, Tensor, Tensor], None]
"""Called with a parameter's name, the layer's inputs ``[tokens, in]``, and its delta ``[in, out]``."""


def look_at_inputs(full: Any, base: Checkpoint, names: Collection[str], samples: Sequence[Sample], look: Look) -> None:
    """Have ``look`` called for each sample and each of ``names`` that it reaches, one after the other."""
    layers = {module: name for name, module in full.named_modules() if f"{name}.weight" in names}
    parameters = dict(full.named_parameters())

    def inputs_of(layer: str, inputs: Tensor) -> None:
        name = f"{layer}.weight"
        delta = parameters[name] - base.read(base.held_as(name)).float()
        transposed = name in base.architecture.transposed
        look(name, inputs.reshape(-1, inputs.shape[-1]), delta if transposed else delta.T)

    with watching(layers, inputs_of):
        for sample in samples:
            full.base_model(input_ids=torch.tensor([sample.ids]))
