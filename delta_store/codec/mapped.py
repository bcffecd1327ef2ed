"""The tensors of a safetensors file as views of its mapping: ``safe_open`` takes ten times as long for a small one."""

import json
import mmap
from pathlib import Path

import torch
from torch import Tensor


class MappedTensors:
    """For a file that ``open_artifact`` has checked. It stays mapped as long as one of its tensors is in use."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants to be able to write
        start = 8 + int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8:start])
        self._spans = {key: one["data_offsets"] for key, one in header.items() if key != "__metadata__"}
        self._bytes = torch.frombuffer(mapped, dtype=torch.uint8)[start:]

    def get_tensor(self, key: str) -> Tensor:
        """uint8 ``[n]``"""
        begin, end = self._spans[key]
        return self._bytes[begin:end]
