"""The processes as torch knows them: how they meet, and how results are added up."""

import os
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, device

PATIENCE = timedelta(seconds=120)
"""Whoever waits longer for another process's result gives up."""


def join(rank: int, size: int, meeting: Path, on: device) -> None:
    """Meet the others; all of them are on this machine. ``meeting`` is a file that does not exist yet."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    kind = "nccl" if on.type == "cuda" else "gloo"
    dist.init_process_group(kind, init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=PATIENCE)


def add_up(y: Tensor) -> Tensor:
    """The sum of what all processes have, in place."""
    dist.all_reduce(y)
    return y


def leave() -> None:
    """End the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
