"""What transformers says the model of a configuration consists of, asked without allocating any of it."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.pytorch_utils import Conv1D

from deltaserve.delta_store.errors import CheckpointError, UnsupportedCheckpoint

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Path components that torch's compiler and its parallel wrappers put into names; no layer is called like this."""


@dataclass(frozen=True, slots=True, eq=False)
class Architecture:
    """One model class with its sizes.

    ``shapes`` has every parameter and persistent buffer by its ``state_dict`` name. ``tied`` maps the names that the
    configuration says are another parameter's to that parameter. ``transposed`` are the weights of Conv1D layers,
    stored [in, out]. ``embedding`` and ``head`` name the weights of the input embedding and the output head. ``body``
    is what the names of all parameters but a head's begin with. ``is_encoder``: it reads in both directions.
    """

    name: str
    config: Any
    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    transposed: frozenset[str]
    embedding: str
    head: str | None
    body: str
    is_encoder: bool
    _model: Any = field(repr=False)

    def name_in(self, base: "Architecture", name: str) -> str:
        """What ``base``, which may have another head, calls the parameter that is called ``name`` here."""
        if self.name == base.name or not name.startswith(self.body):
            return name
        return base.body + name.removeprefix(self.body)

    def canonical(self, key: str) -> str:
        """The ``state_dict`` name under which transformers would load a checkpoint's ``key``.

        Raises UnsupportedCheckpoint for a tensor that it would not only rename but rearrange.
        """
        transforms = get_model_conversion_mapping(self._model)
        renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        prefix = self._model.base_model_prefix
        name, converter = rename_source_key(key, renamings, converters, prefix, self.shapes)
        if converter is not None:
            raise UnsupportedCheckpoint(
                f"{self.name} stores {key!r} in another arrangement than it computes with (it becomes {name!r}); "
                "such architectures, mixtures of experts mostly, are not supported"
            )
        return str(name)

    def recomputes(self, name: str) -> bool:
        """Whether transformers skips a tensor of this name in a checkpoint, because the model computes it itself."""
        buffers = {buffer for buffer, _ in self._model.named_buffers()} - self.shapes.keys()
        ignored = self._model._keys_to_ignore_on_load_unexpected or ()
        return (
            name in buffers
            or re.search(r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.attn\.(masked_)?bias$", name) is not None
            or any(re.search(pattern, name) for pattern in ignored)
        )


def open_architecture(folder: Path) -> Architecture:
    """The architecture that ``folder/config.json`` names; code that a checkpoint brings along is never run."""
    config = _read_config(folder)
    _refuse_quantised(config, folder)
    return architecture_of(config, _model_class(config, folder))


def architecture_of(config: Any, model_class: Any) -> Architecture:
    """The architecture of a model class of transformers with this configuration."""
    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return Architecture(
        name=model_class.__name__,
        config=config,
        shapes=shapes,
        tied={target: source for target, source in model.all_tied_weights_keys.items() if target in shapes},
        transposed=frozenset(f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)),
        embedding=_weight_name(model, model.get_input_embeddings()) or "",
        head=_weight_name(model, model.get_output_embeddings()),
        body="" if model.base_model is model else f"{model.base_model_prefix}.",
        is_encoder=_is_encoder(config, model_class),
        _model=model,
    )


def strip_wrappers(keys: list[str]) -> dict[str, str]:
    """Each key with the name that it has without wrappers: ``module.`` goes where every key starts with it."""
    stripped = {key: WRAPPERS.sub("", key) for key in keys}
    while stripped and all(name.startswith("module.") for name in stripped.values()):
        stripped = {key: name.removeprefix("module.") for key, name in stripped.items()}
    return stripped


def _read_config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json, so it is not a checkpoint folder of transformers")
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UnsupportedCheckpoint(f"{folder}/config.json: transformers cannot read it: {first_line}") from error


def _refuse_quantised(config: Any, folder: Path) -> None:
    settings = getattr(config, "quantization_config", None) or {}
    # What was once read from GGUF keeps saying so, though its safetensors hold plain numbers.
    if settings and dict(settings).get("quant_method") != "gguf":
        raise UnsupportedCheckpoint(
            f"{folder}: config.json has quantization_config; a delta needs the weights before quantisation"
        )


def _model_class(config: Any, folder: Path) -> Any:
    """The class that ``architectures`` names; a decoder without its head counts as the model with one."""
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    named = (config.architectures or [None])[0]
    if named is None and causal is not None:
        return causal
    model_class = getattr(transformers, named or "", None)
    if model_class is None:
        raise UnsupportedCheckpoint(
            f"{folder}/config.json: architecture {named!r} is not one of transformers {transformers.__version__}"
        )
    is_headless = transformers.MODEL_MAPPING.get(type(config), None) is model_class
    return causal if is_headless and causal is not None and not _is_encoder(config, model_class) else model_class


def _is_encoder(config: Any, model_class: Any) -> bool:
    """Whether it is of a family that predicts masked tokens, and was not made to generate."""
    generates = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    is_causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is model_class
    return type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not generates and not is_causal


def _weight_name(model: Any, layer: Any) -> str | None:
    return next((f"{path}.weight" for path, module in model.named_modules() if module is layer), None)
