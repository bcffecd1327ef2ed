"""What a run of the benchmark is: all that is needed to run the same again."""

from dataclasses import asdict, dataclass, field
from typing import Any

from deltaserve.server.bench.client import Asking
from deltaserve.server.bench.statistics import PERCENTILE_METHOD


@dataclass(frozen=True, slots=True)
class Setup:
    """``prompts`` says where they came from. ``rate`` is requests a second in an open loop, None for a closed one.

    ``concurrency`` is how many requests are under way in a closed loop, and the most of them in an open one, where None
    sets no bound.
    """

    url: str
    mix: str
    models: tuple[str, ...]
    requests: int
    concurrency: int | None
    warmup_requests: int
    prompts: str
    seed: int
    asking: Asking
    rate: float | None = None
    burstiness: float = 1.0
    zipf_exponent: float = 1.0
    goodput_ms: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        setup = asdict(self)
        asking = setup.pop("asking")
        return {**setup, **asking, "loop": self.loop, "percentile_method": PERCENTILE_METHOD}

    @property
    def loop(self) -> str:
        return "closed" if self.rate is None else "open"

    def __str__(self) -> str:
        """One sentence for people, who need not see a thousand names."""
        shown = ", ".join(self.models[:8]) + (f" and {len(self.models) - 8} more" if len(self.models) > 8 else "")
        is_special = self.mix == "zipf" and self.zipf_exponent != 1.0
        mix = f"{self.mix} (exponent {self.zipf_exponent:g})" if is_special else self.mix
        return f"Mix: {mix} over {shown}. {self._load()}."

    def _load(self) -> str:
        if self.rate is None:
            return f"Concurrency: {self.concurrency} (closed loop)"
        bound = f", {self.concurrency} under way at most" if self.concurrency else ""
        return f"Rate: {self.rate:g} requests/s, burstiness {self.burstiness:g} (open loop{bound})"
