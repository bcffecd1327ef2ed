"""A GGUF file becomes an ordinary checkpoint folder in the cache, once, through transformers."""

import logging
import os
import shutil
import struct
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaserve.delta_store.cache_folder import cache_folder, identity
from deltaserve.delta_store.errors import CheckpointError, UnsupportedCheckpoint

logger = logging.getLogger(__name__)


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that ``path`` is, or that lies alone in the folder ``path``; None where it is no such thing."""
    if path.is_file():
        return path.resolve() if path.suffix == ".gguf" else None
    files = sorted(path.glob("*.gguf"))
    if not files or (path / "config.json").is_file():
        return None
    if len(files) > 1:
        raise CheckpointError(f"{path} holds {len(files)} GGUF files; name one of them, for instance {files[0]}")
    return files[0].resolve()


def converted(file: Path) -> Path:
    """The folder with the float32 safetensors, configuration and tokenizer of ``file``; made at first use."""
    folder = cache_folder() / "gguf" / identity([file])
    if not folder.exists():
        if find_spec("gguf") is None:
            raise CheckpointError(f"{file}: reading GGUF needs one package more: pip install 'deltaserve[gguf]'")
        logger.warning("Converting %s to safetensors in %s, once", file, folder)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        try:
            _convert(file, partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, IndexError, NotImplementedError, struct.error) as error:
        raise UnsupportedCheckpoint(f"{file}: transformers cannot read this GGUF file: {error}") from error
    folder.mkdir(parents=True)
    copies = model.all_tied_weights_keys
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in copies}
    # save_pretrained refuses a model that came from GGUF, and would need the weights a second time.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
