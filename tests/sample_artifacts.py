"""A small artifact with every mask, codec and kind of part, whose bytes are the same everywhere."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaserve.delta_store.codec import encode
from deltaserve.delta_store.codec.artifact import Artifact, write_artifact
from deltaserve.delta_store.codec.specs import DenseSpec, LowRankSpec, RowsSpec, SparseSpec, Spec
from deltaserve.delta_store.codec.xor import xor
from deltaserve.kernels.reference import unpack

BASE = "b" * 64
CODED = {"int8": 64, "int4": 64, "int2": 128, "sign": 64}


class Weights:
    """A profile in which column ``j`` of every parameter has weight ``16 + j``."""

    digest = "d" * 64

    def __contains__(self, name: str) -> bool:
        return True

    def weights(self, name: str) -> Tensor:
        return torch.arange(16, 16 + 63)


def values(*shape: int, start: int = 0) -> Tensor:
    """Numbers that are the same everywhere: multiples of 1/64 from -50/64 to 50/64."""
    count = int(np.prod(shape))
    return ((torch.arange(start, start + count) * 37 % 101 - 50) / 64).reshape(shape)


def all_parts() -> list[tuple[str, Spec, Any]]:
    """Every mask, codec and kind once."""
    parts: list[tuple[str, Spec, Any]] = []
    for codec, group in {**CODED, "bf16": 1, "float32": 1}.items():
        fields: dict[str, Any] = {"shape": (21, 63), "kept": 7, "block": 8, "codec": codec, "group": group}
        uniform = SparseSpec(mask="uniform", seed=1, divisor=7 / 63, **fields)
        weighted = SparseSpec(mask="weighted", seed=2, divisor=1.0, **fields)
        explicit = SparseSpec(mask="explicit", seed=None, divisor=0.5, **fields)
        name = f"layers.{codec}.weight"
        columns = torch.arange(7).repeat(3, 1) * torch.tensor([[1], [2], [10]])
        parts += [
            (name, uniform, encode.seeded_sparse(values(21, 63), uniform, name)),
            (name, weighted, encode.seeded_sparse(values(21, 63, start=5), weighted, name, Weights())),
            (name, explicit, encode.explicit_sparse(values(21, 63, start=9), explicit, columns)),
        ]
        dense = DenseSpec(shape=(63,), codec=codec, group=group)
        parts.append((f"layers.{codec}.bias", dense, encode.dense(values(63), dense)))
    low_rank = LowRankSpec(shape=(21, 63), rank=2, codec="int8", group=16)
    rows = RowsSpec(shape=(21, 63), base_rows=20, count=2, codec="bf16", has_mean=True)
    xor_spec, payload = xor(values(20, 6), values(21, 6, start=3))
    return [
        *parts,
        ("embedding", low_rank, encode.low_rank(values(2, 63), values(21, 2), low_rank)),
        ("embedding", rows, encode.rows(values(2, 63), torch.tensor([4, 20]), values(63), rows)),
        ("exact", xor_spec, payload),
    ]


def write(path: Path, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "base": BASE,
        "tied_head": True,
        "parts": all_parts(),
        "profile": Weights.digest,
        "provenance": {"method": "weighted", "density": 0.05},
        "quality": {"mean_kl": 0.0125},
        "files": {"tokenizer.json": b'{"version": "1.0"}', "chat_template.jinja": "{{ 'é' }}".encode()},
    }
    return write_artifact(path, **arguments | changes)


def read_all(artifact: Artifact) -> dict[str, Tensor]:
    base = {"exact": values(20, 6)}
    return {name: unpack(artifact.delta(name, Weights(), base.get(name))) for name in artifact.names}
