"""A checkpoint as a plain transformers model: what calibration and quality measurements run."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from deltaserve.delta_store.architecture import Architecture


def plain_model(
    architecture: Architecture, config: Any, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Any:
    """The model in evaluation mode, with ``tensors`` as its parameters in ``dtype``. Takes the memory of one model."""
    state = {name: tensor.to(dtype) for name, tensor in tensors}
    with _quiet():
        return _model_class(architecture).from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def model_without_weights(architecture: Architecture, config: Any) -> Any:
    """The model in evaluation mode, its parameters on the meta device; buffers are there."""
    with _parameters_on_meta():
        return _model_class(architecture)(config).eval()


def variant_config(architecture: Architecture, vocabulary: int, tied: bool, dtype: torch.dtype) -> Any:
    """The base's configuration object, with these sizes instead; how the base was once quantised is forgotten."""
    config = deepcopy(architecture.config)
    text = config.get_text_config(decoder=True)
    text.vocab_size = vocabulary
    text.tie_word_embeddings = config.tie_word_embeddings = tied
    config.dtype = dtype
    config.architectures = [architecture.name]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def embedding_names(architecture: Architecture) -> frozenset[str]:
    """The weights of which a row is looked up (tokens, positions, ...), and the output head's."""
    with torch.device("meta"):
        model = _model_class(architecture)(architecture.config)
    found = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return frozenset(found if architecture.head is None else found | {architecture.head})


def _model_class(architecture: Architecture) -> Any:
    import transformers

    return getattr(transformers, architecture.name)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters leave the memory as soon as a module has them, before anybody writes into it."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter if parameter is None else nn.Parameter(parameter.to("meta"), False))

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars, which would break ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
