"""How an engine runs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The settings have the same names.

    ``context`` None is the model's own, ``threads`` None the numeric libraries' own choice. ``cache_tokens`` are shared
    by all requests; ``batch_tokens`` and ``max_running`` bound one step; ``bank_bytes`` and ``bank_slots`` bound the
    variants in memory, ``host_bytes`` the artifacts that stay open. ``weights``: those of linear layers are ``plain``,
    in ``dtype``; ``int8`` with a float32 scale a row; or ``packed``, kept twice where that is faster. ``policy`` is
    ``auto``, ``mixed`` or ``swap`` (policy.py). ``device`` is ``auto``, ``cpu`` or ``cuda`` (device.py). A request
    waits for its turn at most ``max_wait_seconds``; None is as long as it takes. ``tensor_parallel``: so many processes
    share the base (parallel/); each has ``threads``, ``bank_bytes`` and ``host_bytes`` of its own.
    """

    device: str = "auto"
    dtype: str = "float32"
    weights: str = "plain"
    policy: str = "auto"
    backend: str = "auto"
    bank_bytes: int = 2**30
    bank_slots: int = 64
    host_bytes: int = 2**32
    cache_tokens: int = 16384
    context: int | None = None
    max_running: int = 32
    max_waiting: int = 256
    max_wait_seconds: float | None = None
    batch_tokens: int = 512
    threads: int | None = None
    tensor_parallel: int = 1
