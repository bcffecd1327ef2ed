"""What the user allows, and whether a measured artifact is within it."""

from dataclasses import dataclass, replace
from math import inf

from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.selection.journal import Point

REPORT_BYTES = 3072
"""Room for the quality report, which is not yet in the files that are measured."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """One limit: ``max_kl`` (nats; with ``relative`` a fraction of the base's own), ``min_agreement``, ``min_score``
    (fractions), or ``bytes`` of the whole file, within which the KL is to be least."""

    kind: str
    value: float
    relative: bool = False

    def __post_init__(self) -> None:
        name = f"--{self.kind.replace('_', '-')}"
        if self.kind in ("min_agreement", "min_score") and not 0 < self.value <= 1:
            raise OptionError(f"{name} is {self.value:g}; it is a fraction, from 0 to 1 (0.98 for 98 %)")
        if self.kind == "max_kl" and not 0 < self.value < inf:
            raise OptionError(f"{name} is {self.value:g}; it is a number of nats above 0 (0.004), or a share (2%)")
        if self.kind == "bytes" and self.value <= REPORT_BYTES:
            raise OptionError(f"{name} is {self.value:g}; an artifact has more than {REPORT_BYTES} bytes of headers")

    @property
    def label(self) -> str:
        match self.kind:
            case "max_kl":
                return f"KL at most {self.value:.3g}" + (" of the base's" if self.relative else "")
            case "min_agreement":
                return f"top-1 agreement at least {self.value:.2%}"
            case "min_score":
                return f"score at least {self.value:.1%}"
        return f"at most {self.value:,.0f} bytes"

    def goal(self, base: Point | None) -> "Goal":
        """This tolerance on one text, of which ``base`` is what the bare base gives."""
        if self.kind == "bytes":
            return Goal("bytes", self.value - REPORT_BYTES)
        if self.relative and base is None:
            raise OptionError("The base cannot predict the fine-tune's added tokens, so its KL is unknown; give nats")
        if self.kind == "max_kl":
            return Goal("kl", self.value * (base.kl if self.relative and base else 1))
        return Goal("disagreement" if self.kind == "min_agreement" else "mistakes", 1 - self.value)


@dataclass(frozen=True, slots=True)
class Goal:
    """``error`` (a property of Point) at most ``allowed``; among those that fit, the one of least ``cost`` is best."""

    error: str
    allowed: float

    @property
    def grows(self) -> bool:
        """Whether a larger artifact has more of the error: bytes, against which KL is the cost."""
        return self.error == "bytes"

    def on_other_text(self, base: Point | None, other: Point | None) -> "Goal":
        """As hard to reach on a text where the bare base's error is another."""
        if self.grows or base is None or other is None or not (here := getattr(base, self.error)):
            return self
        return replace(self, allowed=self.allowed * getattr(other, self.error) / here)

    def excess(self, point: Point) -> float:
        """The error as a multiple of what is allowed: up to 1 fits."""
        found: float = getattr(point, self.error)
        if found <= self.allowed:
            return found / self.allowed if self.allowed else 0.0
        return found / self.allowed if self.allowed else inf

    def fits(self, point: Point) -> bool:
        return self.excess(point) <= 1

    def cost(self, point: Point) -> float:
        return point.kl if self.grows else float(point.bytes)
