"""The weight files of a checkpoint: which ones a folder has, and how one tensor is read from one of them.

Nothing stays open or mapped between reads, so a model that is read tensor by tensor never fills the memory.
"""

import json
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltaserve.delta_store.errors import CheckpointError, MissingTensors, UnsafeCheckpoint, UnsupportedCheckpoint

logger = logging.getLogger(__name__)

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Shard(Protocol):
    """One weight file."""

    @property
    def path(self) -> Path: ...
    def headers(self) -> dict[str, Header]: ...
    def read(self, key: str) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class SafetensorsShard:
    """A ``.safetensors`` file."""

    path: Path

    def headers(self) -> dict[str, Header]:
        try:
            with safe_open(self.path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                return {key: self._header(key, part.get_shape(), part.get_dtype()) for key, part in slices.items()}
        except SafetensorError as error:
            raise CheckpointError(f"{self.path} is damaged or not a safetensors file: {error}") from error

    def _header(self, key: str, shape: list[int], dtype: str) -> Header:
        if dtype not in DTYPES:
            raise UnsupportedCheckpoint(f"{self.path}: {key!r} is stored as {dtype}; known are {', '.join(DTYPES)}")
        return Header(tuple(shape), DTYPES[dtype])

    def read(self, key: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor.clone()


@dataclass(frozen=True, slots=True)
class PickleShard:
    """A ``.bin`` file, through torch's safe loader alone: it builds tensors and plain containers, nothing else."""

    path: Path

    def headers(self) -> dict[str, Header]:
        return {key: Header(tuple(tensor.shape), tensor.dtype) for key, tensor in self._load().items()}

    def read(self, key: str) -> Tensor:
        return self._load()[key].detach().clone(memory_format=torch.contiguous_format)

    def _load(self) -> dict[str, Tensor]:
        try:
            loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise UnsafeCheckpoint(
                f"{self.path}: the safe loader refuses it, because it asks for {self._unsafe_names()}. "
                "Convert it to safetensors where you trust it; there is no option to load it here"
            ) from error
        except (RuntimeError, EOFError) as error:
            raise CheckpointError(
                f"{self.path} is damaged, or in torch's format from before 1.6; save it again as safetensors"
            ) from error
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise UnsupportedCheckpoint(
                f"{self.path} holds more than names and tensors (a training state?); save the model's state_dict alone"
            )
        return loaded

    def _unsafe_names(self) -> str:
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(self.path)
        except (RuntimeError, ValueError, pickle.UnpicklingError):
            names = []
        return ", ".join(sorted(names)) or "something that is not a tensor"


def find_shards(folder: Path, stems: tuple[str, str] = (SAFETENSORS, PICKLE)) -> list[Shard]:
    """The weight files of a folder; safetensors come before ``.bin``, which is then left alone and logged.

    Raises CheckpointError where there is none, and MissingTensors where an index names a shard that is not there.
    """
    found = [(stem, paths) for stem in stems if (paths := _files(folder, stem))]
    if not found:
        raise CheckpointError(f"{folder} holds neither {stems[0]} nor {stems[1]}, whole or with an index")
    stem, paths = found[0]
    for other, _ in found[1:]:
        logger.info("%s holds %s and %s: %s is read", folder, stem, other, stem)
    return [SafetensorsShard(path) if stem.endswith(".safetensors") else PickleShard(path) for path in paths]


def _files(folder: Path, stem: str) -> list[Path]:
    index = folder / f"{stem}.index.json"
    if (folder / stem).is_file():
        return [folder / stem]
    if not index.is_file():
        return []
    paths = [folder / name for name in _shard_names(index)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise MissingTensors(f"{index} names shards that are not there: {', '.join(missing)}")
    return paths


def _shard_names(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of shards: it has no readable weight_map") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index} names a shard outside its folder: {outside[0]!r}")
    return names
