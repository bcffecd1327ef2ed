"""From the last hidden states of a text to its embedding, as the files of sentence-transformers beside a model say."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltaserve.delta_store.errors import CheckpointError, UnsupportedCheckpoint

Mode = Literal["cls", "mean"]


@dataclass(frozen=True, slots=True)
class Pooling:
    """``longest``: tokens of the longest text that the model was made for, None where its files do not say."""

    mode: Mode = "mean"
    normalised: bool = False
    longest: int | None = None

    def embed(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """float32 ``[texts, width]`` of a flat batch ``[rows, width]`` of texts of ``lengths`` int64 ``[texts]``."""
        if self.mode == "cls":
            pooled = hidden[lengths.cumsum(0) - lengths].float()
        else:
            owners = torch.arange(len(lengths)).repeat_interleave(lengths)
            sums = torch.zeros(len(lengths), hidden.shape[1]).index_add_(0, owners, hidden.float())
            pooled = sums / lengths[:, None]
        return normalize(pooled, dim=1) if self.normalised else pooled


def pooling_of(folder: Path) -> Pooling:
    """What modules.json in a model's folder says; without it, as in sentence-transformers, the plain mean.

    Raises UnsupportedCheckpoint for other modules and other ways to pool, CheckpointError for files that are no JSON.
    """
    if not (folder / "modules.json").is_file():
        return Pooling()
    mode: Mode = "mean"
    normalised, longest = False, None
    for module in _read(folder / "modules.json"):
        kind, place = str(module.get("type")).rpartition(".")[2], folder / str(module.get("path", ""))
        if kind == "Transformer":
            longest = _longest(place)
        elif kind == "Pooling":
            mode = _mode(place / "config.json")
        elif kind == "Normalize":
            normalised = True
        else:
            raise UnsupportedCheckpoint(
                f"{folder}/modules.json has a {kind}; supported are Transformer, Pooling and Normalize"
            )
    return Pooling(mode, normalised, longest)


def _longest(place: Path) -> int | None:
    path = place / "sentence_bert_config.json"
    length = _read(path).get("max_seq_length") if path.is_file() else None
    return length if isinstance(length, int) and length > 0 else None


def _mode(path: Path) -> Mode:
    told = _read(path)
    modes = sorted(
        key.removeprefix("pooling_mode_") for key, on in told.items() if key.startswith("pooling_mode_") and on is True
    )
    modes = modes or [str(told.get("pooling_mode"))]  # how newer versions write it
    if modes == ["mean_tokens"] or modes == ["mean"]:
        return "mean"
    if modes == ["cls_token"] or modes == ["cls"]:
        return "cls"
    raise UnsupportedCheckpoint(f"{path} pools by {' and '.join(modes)}; supported are the mean and the first token")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
