"""What process 0 tells the others, and what they answer. All arrives in the order in which it was sent."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaserve.server.engine.limits import EngineLimits
from deltaserve.server.engine.requests import Version


@dataclass(frozen=True, slots=True)
class Begin:
    """The first message: load your share of the base in ``folder``, answer ``Ready``."""

    folder: Path
    fingerprint: str
    limits: EngineLimits
    rank: int


@dataclass(frozen=True, slots=True)
class Meet:
    """All are ready: join the group at this file, then take messages."""

    meeting: Path


@dataclass(frozen=True, slots=True)
class NewCache:
    """Forget all keys and values; ``config`` is the library's, with the sizes of the cache."""

    config: Any


@dataclass(frozen=True, slots=True)
class Load:
    """Read a version and answer ``Loaded``; ``profile`` is its activation profile, if it needs one."""

    version: Version
    profile: Path | None


@dataclass(frozen=True, slots=True)
class Install:
    """Put what was loaded last into a slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class Clear:
    """Forget what is in a slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class Step:
    """Run the model's body: ``rows`` are the arguments of ``Routing.assign``, ``inputs`` the model's, ``packed``.

    ``requests`` are those of a ``Paged`` without backend and cache, None where attention does not read pages in place.
    """

    rows: tuple[Sequence[Any], Mapping[str, Any]]
    inputs: Mapping[str, Any]
    requests: tuple[Any, ...] | None


Message = Meet | NewCache | Load | Install | Clear | Step


@dataclass(frozen=True, slots=True)
class Ready:
    """The share of the base is loaded."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A version is there, or could not be read."""

    error: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The process ends, and why."""

    error: str


def packed(value: Any) -> Any:
    """The same with an array for each tensor: pickled as fast as bytes, and without the storage around a view."""
    return _changed(value, lambda one: one.cpu().numpy() if isinstance(one, Tensor) else one)


def unpacked(value: Any, device: torch.device) -> Any:
    """What ``packed`` was given, with its tensors on ``device``."""
    return _changed(value, lambda one: torch.from_numpy(one).to(device) if isinstance(one, np.ndarray) else one)


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {name: _changed(one, change) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_changed(one, change) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _changed(getattr(value, field.name), change) for field in fields(value)})
    return change(value)
