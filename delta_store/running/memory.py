"""How much of a model is in memory while it runs: all of it where that fits comfortably, else one layer at a time."""

import logging
import os
from pathlib import Path

from rich.filesize import decimal

from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.running.layers import Layerwise
from deltaserve.delta_store.running.whole import Whole

logger = logging.getLogger(__name__)

WHOLE, LAYERS, AUTO = "whole", "layers", "auto"
MEMORY = (AUTO, WHOLE, LAYERS)
COMFORTABLE_SHARE = 0.5
"""Of the free memory: the rest is for predictions, activations and whoever else runs."""

CGROUP = Path("/sys/fs/cgroup")

Runner = Whole | Layerwise


def check_memory(memory: str) -> None:
    """Raise OptionError for anything but one of ``MEMORY``."""
    if memory not in MEMORY:
        raise OptionError(f"Unknown memory {memory!r}; known are: {', '.join(MEMORY)}")


def runner_for(memory: str, parameters: int) -> tuple[Runner, str]:
    """Who runs a model of so many parameters, and in words why.

    ``memory``: ``whole``, ``layers``, or ``auto``: whole where that takes at most half of the free memory.
    """
    check_memory(memory)
    if memory != AUTO:
        return (Whole() if memory == WHOLE else Layerwise()), f"{memory}, as asked"
    needed, free = 4 * parameters, free_bytes()
    fits = needed <= COMFORTABLE_SHARE * free
    relation = "at most" if fits else "more than"
    why = f"{decimal(needed)} in float32 is {relation} half of the {decimal(free)} that are free"
    found = f"{WHOLE if fits else LAYERS}: {why}"
    logger.info("Models are measured with memory %s", found)
    return (Whole() if fits else Layerwise()), found


def free_bytes() -> int:
    """What this process may still take: of the machine, and of the container that it is in."""
    return min([_free_of_machine(), *_free_of_container()])


def _free_of_machine() -> int:
    """The kernel's own estimate, caches that can go included; where it gives none, half of all memory."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _free_of_container() -> list[int]:
    """Under cgroup v2; nothing where there is no limit."""
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return []
    cache = int(statistics.get("inactive_file", 0))
    return [] if limit == "max" else [max(0, int(limit) - int(used) + cache)]
