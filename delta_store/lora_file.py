"""The tensors of a LoRA adapter's file, by the module that they change; what has no place is refused by name."""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from deltaserve.delta_store.architecture import strip_wrappers
from deltaserve.delta_store.bits import same_bits
from deltaserve.delta_store.errors import CheckpointError, MissingTensors, UnsupportedCheckpoint
from deltaserve.delta_store.shards import Header, Shard, find_shards

logger = logging.getLogger(__name__)

STEMS = ("adapter_model.safetensors", "adapter_model.bin")

KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\."
    r"(?P<role>lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector"
    r"|(?:base_layer\.|modules_to_save\.|original_module\.)?(?:weight|bias))(?:(?<=vector)\.weight)?"
)
"""``modules_to_save.`` marks a fully trained copy and ``original_module.`` what it replaced; ``base_layer.`` marks a
tensor of the base that was saved because its bias was trained or the vocabulary resized."""

PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file."""

    shard: Shard
    key: str
    header: Header

    def read(self) -> Tensor:
        return self.shard.read(self.key)


Roles = dict[str, Entry]
"""What the file holds of one module, by role; a role is the end of the key, as ``KEY`` knows them."""


def read_modules(folder: Path, parameters: Iterable[str]) -> dict[str, Roles]:
    """The file's tensors by module path of the base, whose ``parameters`` are given.

    Raises UnsupportedCheckpoint, listing every tensor, where one has a role or a parameter that is not known;
    CheckpointError with counts and samples where modules are not the base's; MissingTensors for half a pair.
    """
    entries = {
        key: Entry(shard, key, header)
        for shard in find_shards(folder, STEMS)
        for key, header in shard.headers().items()
    }
    known = set(parameters)
    modules, unused = _grouped(entries, folder)
    unused += _take_unused(modules, known, folder)
    _check_matching(modules, _layers(known), folder)
    if unused:
        raise UnsupportedCheckpoint(
            f"{folder}: the adapter holds tensors that have no place in the base: {', '.join(sorted(unused))} "
            "(see bias, lora_bias, modules_to_save and the like in adapter_config.json)"
        )
    _check_pairs(modules, folder)
    return modules


def _layers(known: set[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in known}


def _grouped(entries: dict[str, Entry], folder: Path) -> tuple[dict[str, Roles], list[str]]:
    """The tensors by module, and the keys that do not even look like an adapter's."""
    if not entries:
        raise MissingTensors(f"{folder}: the adapter holds no tensors")
    modules: dict[str, Roles] = {}
    strange = []
    for key, clean in strip_wrappers(list(entries)).items():
        if (match := KEY.fullmatch(clean)) is None:
            strange.append(key)
        else:
            _place(entries[key], match["role"], modules.setdefault(match["module"], {}), folder)
    return modules, strange


def _place(entry: Entry, role: str, roles: Roles, folder: Path) -> None:
    role = role.removeprefix("modules_to_save.")
    if role in roles and not same_bits(roles[role].read(), entry.read()):
        raise CheckpointError(f"{folder}: {roles[role].key!r} and {entry.key!r} should be one tensor, but differ")
    roles[role] = entry


def _take_unused(modules: dict[str, Roles], known: set[str], folder: Path) -> list[str]:
    """Take out of ``modules``, and return, the keys that belong to the base's layers but have no place there."""
    layers = _layers(known)
    unused = []
    # What lies below one of the base's layers is of a kind that KEY takes for a module of its own.
    for path in [path for path in modules if path not in layers and path.rpartition(".")[0] in layers]:
        unused += [entry.key for entry in modules.pop(path).values()]
    for path in modules.keys() & layers:
        roles = modules[path]
        _drop_replaced(roles, folder)
        unused += [entry.key for role, entry in roles.items() if not _has_place(path, role, roles, known)]
    return unused


def _drop_replaced(roles: Roles, folder: Path) -> None:
    """PEFT keeps what a fully trained copy replaced, and never computes with it."""
    for kind in ("weight", "bias"):
        if kind in roles and (replaced := roles.pop(f"original_module.{kind}", None)) is not None:
            logger.info("%s: %r is replaced by %r and not used", folder, replaced.key, roles[kind].key)


def _has_place(path: str, role: str, roles: Roles, known: set[str]) -> bool:
    if role.startswith("original_module."):
        return False
    if role == "lora_magnitude_vector":
        return any(a in roles for a, _ in PAIRS)
    kind = "bias" if role.endswith("bias") else "weight"
    return f"{path}.{kind}" in known


def _check_matching(modules: dict[str, Roles], layers: set[str], folder: Path) -> None:
    strangers = [path for path in modules if path not in layers]
    if strangers:
        ending = strangers[0].rpartition(".")[2]
        like = [path for path in sorted(layers) if path.endswith(ending)] or sorted(layers)
        raise CheckpointError(
            f"{folder}: {len(modules) - len(strangers)} of {len(modules)} modules of the adapter are in the base. "
            f"Not there: {', '.join(strangers[:3])}. The base has: {', '.join(like[:3])}. "
            "Was the adapter trained on another model, or saved with a prefix?"
        )


def _check_pairs(modules: dict[str, Roles], folder: Path) -> None:
    for path, roles in modules.items():
        for one, other in PAIRS:
            if (one in roles) != (other in roles):
                raise MissingTensors(f"{folder}: {path} has only one of {one} and {other}")
