"""What files are together, by their names: an artifact, a LoRA adapter, or a whole checkpoint."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from deltaserve.delta_store.errors import UploadError
from deltaserve.delta_store.shards import SAFETENSORS
from deltaserve.delta_store.variant_files import VARIANT_FILES

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Each must come; VARIANT_FILES may."""

INDEX = f"{SAFETENSORS}.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

Kind = Literal["artifact", "adapter", "checkpoint"]


@dataclass(frozen=True, slots=True)
class Contents:
    """``files`` by the names that they have in a folder; ``text`` is what a checkpoint's compression is measured on."""

    kind: Kind
    files: Mapping[str, Path]
    text: Path | None = None


def contents_of(files: Sequence[tuple[str, Path]]) -> Contents:
    """What these are, each given by its name and its path. Raises UploadError for what is nothing of that."""
    given = dict(files)
    if len(given) < len(files):
        twice = next(name for i, (name, _) in enumerate(files) if name in dict(files[:i]))
        raise UploadError(f"Two of the files are called {twice!r}; send each once")
    for name in given:
        if name.endswith(PICKLES):
            raise UploadError(f"{name!r} is a pickle, which could run any program; send the weights as safetensors")
    if given.keys() & set(ADAPTER_FILES):
        return _adapter(given)
    if len(given) == 1 and (artifact := next(iter(given.values()))) and not _is_plain(artifact):
        return Contents("artifact", {"artifact": artifact})
    return _checkpoint(given)


def write_index(folder: Path) -> None:
    """Write the index that a checkpoint of several shards lacks. Raises UploadError for a shard that is damaged."""
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / INDEX).exists() or shards == [SAFETENSORS]:
        return
    if len(shards) == 1:
        (folder / shards[0]).rename(folder / SAFETENSORS)
        return
    weight_map: dict[str, str] = {}
    for shard in shards:
        try:
            with safe_open(folder / shard, "pt") as opened:
                names = list(opened.keys())
        except SafetensorError as error:
            raise UploadError(f"{shard!r} is damaged or not a safetensors file: {error}") from error
        if twice := weight_map.keys() & set(names):
            raise UploadError(f"{min(twice)!r} is in {weight_map[min(twice)]!r} and in {shard!r}; send the index too")
        weight_map |= dict.fromkeys(names, shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def _adapter(given: Mapping[str, Path]) -> Contents:
    if missing := [name for name in ADAPTER_FILES if name not in given]:
        raise UploadError(f"The adapter's {missing[0]} is missing; send {' and '.join(ADAPTER_FILES)}")
    _check_known(given, (*ADAPTER_FILES, *VARIANT_FILES), "a LoRA adapter")
    return Contents("adapter", given)


def _checkpoint(given: Mapping[str, Path]) -> Contents:
    shards = [name for name in given if name.endswith(".safetensors")]
    if not shards:
        raise UploadError(
            f"{', '.join(given)}: none of these is an artifact, a LoRA adapter ({' and '.join(ADAPTER_FILES)}) or a "
            "checkpoint (its .safetensors, with their index and config.json)"
        )
    texts = [name for name in given if name.endswith(".jsonl")]
    if len(texts) > 1:
        raise UploadError(f"One file of text is enough to measure on, not {' and '.join(texts)}")
    _check_known(given, (*shards, *texts, "config.json", INDEX, *VARIANT_FILES), "a checkpoint")
    files = {name: path for name, path in given.items() if name not in texts}
    return Contents("checkpoint", files, given[texts[0]] if texts else None)


def _check_known(given: Mapping[str, Path], known: Sequence[str], kind: str) -> None:
    if unknown := [name for name in given if name not in known]:
        raise UploadError(f"{unknown[0]!r} has no place in {kind}; leave it out")


def _is_plain(path: Path) -> bool:
    """Whether a file is safetensors, but no artifact."""
    try:
        with safe_open(path, "pt") as opened:
            return "deltaserve" not in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False
