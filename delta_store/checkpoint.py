"""A checkpoint: its tensors under the names that transformers gives them, read one at a time."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaserve.delta_store.architecture import Architecture, open_architecture, strip_wrappers
from deltaserve.delta_store.errors import CheckpointError, MissingTensors, UnsupportedCheckpoint
from deltaserve.delta_store.gguf import converted, find_gguf
from deltaserve.delta_store.hub import snapshot
from deltaserve.delta_store.shards import Header, Shard, find_shards

logger = logging.getLogger(__name__)

SHOWN = 8
"""As many names as a message lists before it only counts."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies: ``key`` is its name in that file."""

    shard: Shard
    key: str
    header: Header


class Checkpoint:
    """The tensors of one model, by transformers' ``state_dict`` names; a name whose tensor is another's is left out.

    ``folder`` is an ordinary checkpoint folder, ``config`` its config.json, ``files`` its weights. ``tied`` says that
    input embedding and output head are one matrix, which then has the embedding's name. ``names`` are sorted.
    """

    def __init__(self, folder: Path, architecture: Architecture, stored: dict[str, Stored], tied: bool) -> None:
        self.folder = folder
        self.architecture = architecture
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.tied = tied
        self.names = tuple(sorted(stored))
        self.files = tuple(sorted({part.shard.path for part in stored.values()}))
        self._stored = stored

    def held_as(self, name: str) -> str:
        """The name under which a parameter's values lie: a tied head's are the embedding's."""
        return self.architecture.embedding if self.tied and name == self.architecture.head else name

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].header.shape

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[name].header.dtype

    def read(self, name: str) -> Tensor:
        """The tensor, contiguous, in a storage of its own and in the file's dtype."""
        stored = self._stored[name]
        return stored.shard.read(stored.key)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder of safetensors or ``.bin`` files, a GGUF file or folder, or ``org/name`` where a hub is in reach.

    Reads headers only. Everything must line up with the architecture that config.json names: raises MissingTensors for
    tensors and shards that are not there, UnsafeCheckpoint for pickles that hold more than tensors,
    UnsupportedCheckpoint for an architecture, dtype or tensor that has no place, and CheckpointError for everything
    else that cannot be read.
    """
    folder = _ordinary_folder(path)
    architecture = open_architecture(folder)
    stored = _by_name(architecture, find_shards(folder), folder)
    tied = _settle_ties(architecture, stored)
    _check_complete(architecture, stored, folder)
    return Checkpoint(folder, architecture, stored, tied)


def _ordinary_folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if not folder.exists():
        folder = snapshot(str(path))
    if (file := find_gguf(folder)) is not None:
        return converted(file)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give the folder that holds config.json and the weights")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is a LoRA adapter, not a whole model")
    return folder.resolve()


def _by_name(architecture: Architecture, shards: Iterable[Shard], folder: Path) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for shard in shards:
        for key, header in shard.headers().items():
            if key in found:
                raise CheckpointError(f"{folder}: {key!r} is in {found[key].shard.path.name} and {shard.path.name}")
            found[key] = Stored(shard, key, header)
    stored: dict[str, Stored] = {}
    for key, clean in strip_wrappers(list(found)).items():
        name = architecture.canonical(clean)
        if name in stored:
            raise CheckpointError(f"{folder}: {key!r} and {stored[name].key!r} are both {name!r}; which one is meant?")
        stored[name] = found[key]
    return stored


def _settle_ties(architecture: Architecture, stored: dict[str, Stored]) -> bool:
    """Drop what is another tensor's copy; returns whether head and embedding are one.

    As in transformers the values decide: a pair that config.json ties but that differs in the file is not tied.
    """
    apart = set()
    for target, source in architecture.tied.items():
        if target not in stored:
            continue
        if source not in stored:
            stored[source] = stored.pop(target)
        elif _equal(stored[target], stored[source]):
            del stored[target]
        else:
            logger.warning("%s and %s are tied in config.json but differ in the file: taken as two", target, source)
            apart.add(target)
    return architecture.head in architecture.tied and architecture.head not in apart


def _equal(one: Stored, other: Stored) -> bool:
    return one.header == other.header and torch.equal(one.shard.read(one.key), other.shard.read(other.key))


def _check_complete(architecture: Architecture, stored: dict[str, Stored], folder: Path) -> None:
    surplus = sorted(stored.keys() - architecture.shapes.keys())
    if skipped := [name for name in surplus if architecture.recomputes(name)]:
        logger.info("%s: skipped what the model computes itself: %s", folder, ", ".join(skipped))
        for name in skipped:
            del stored[name]
    unknown = [name for name in surplus if name in stored]
    missing = sorted(architecture.shapes.keys() - architecture.tied.keys() - stored.keys())
    if missing:
        also = f"; it has tensors that {architecture.name} does not know: {_listed(unknown)}" if unknown else ""
        tying = " (tie_word_embeddings is false, so the head must be there)" if architecture.head in missing else ""
        raise MissingTensors(f"{folder} lacks tensors of {architecture.name}: {_listed(missing)}{tying}{also}")
    if unknown:
        raise UnsupportedCheckpoint(f"{folder} has tensors that {architecture.name} does not know: {_listed(unknown)}")
    for name, part in stored.items():
        if part.header.shape != architecture.shapes[name]:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(part.header.shape)}, "
                f"but config.json makes it {list(architecture.shapes[name])}"
            )


def _listed(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
