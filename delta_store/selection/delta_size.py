"""How large a delta is, and whether it is that of continued pretraining rather than of a fine-tune."""

from collections.abc import Collection
from dataclasses import dataclass
from math import sqrt

from deltaserve.delta_store.fine_tune import FineTune
from deltaserve.delta_store.pruning.whole import difference

SMALL = 1e-3
"""Mean |delta| up to which published fine-tunes lie (WizardMath-7B 4e-4, MetaMath-7B and Abel-7B 7e-4)."""

PRETRAINING = 5e-3
"""Above it lie models that were pretrained on (Qwen2.5-Math and -Coder 1.5e-2, MetaMath-llemma-7B 1.7e-2)."""

PRETRAINING_SHARE = 0.25
"""The same as a share of the base's own size, for models whose weights are small."""


@dataclass(frozen=True, slots=True)
class DeltaSize:
    """Of the matrices that differ: mean |delta|, and the delta's root mean square over the base's.

    ``has_embeddings``: an embedding or output head is among them.
    """

    mean: float
    share: float
    has_embeddings: bool

    @property
    def is_pretraining(self) -> bool:
        return self.mean > PRETRAINING or self.share > PRETRAINING_SHARE

    @property
    def label(self) -> str:
        size = "small" if self.mean <= SMALL else "large"
        advice = "drop at random" if size == "small" else "keep the important or a low rank, or raise q"
        return (
            f"Delta: mean |delta| {self.mean:.2g}, {self.share:.1%} of the base's size: {size} "
            f"(limit {SMALL:g}), where the DAREx paper would {advice}"
        )

    @property
    def warning(self) -> str:
        return (
            f"Mean |delta| is {self.mean:.2g}, {self.share:.0%} of the base's size, more than fine-tuning makes "
            f"(limits {PRETRAINING:g} and {PRETRAINING_SHARE:.0%}): this looks like continued pretraining, "
            "which compresses badly"
        )


def delta_size(fine_tune: FineTune, embeddings: Collection[str]) -> DeltaSize:
    """Reads the fine-tune once, one tensor at a time."""
    count, total, squares, of_base = 0, 0.0, 0.0, 0.0
    has_embeddings = False
    for change in fine_tune.changes():
        delta = change.read()
        if delta.raw[0].dim() != 2:
            continue
        has_embeddings |= change.name in embeddings
        values = difference(delta)
        count += values.numel()
        total += values.abs().sum().item()
        squares += values.square().sum().item()
        of_base += delta.base.square().sum().item()
    return DeltaSize(total / max(count, 1), sqrt(squares / of_base) if of_base else 0.0, has_embeddings)
