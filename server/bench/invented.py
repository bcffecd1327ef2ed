"""A fine-tune made up for a base, for those who want to know what variants cost before they have one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from deltaserve.delta_store.artifact_file import ArtifactFile
from deltaserve.delta_store.checkpoint import Checkpoint, open_checkpoint
from deltaserve.delta_store.delta import TensorDelta
from deltaserve.delta_store.encoding import encode_parts, facts_of
from deltaserve.delta_store.fine_tune import Change, open_fine_tune
from deltaserve.delta_store.fingerprint import fingerprint
from deltaserve.delta_store.pruning.methods import method
from deltaserve.delta_store.pruning.options import Value

METHOD = "dare"
OPTIONS: dict[str, Value] = {"drop": 0.98, "block": 16, "codec": "int2"}
"""As fast as the default method's artifacts, and without a profile."""
NOISE = 1e-4
"""Of every value; small enough to leave the base's answers sane."""


def invent(base: str, out: Path) -> None:
    """Write the artifact of a fine-tune that changed every parameter by noise."""
    checkpoint = open_checkpoint(base)
    fine_tune = replace(open_fine_tune(base, checkpoint), changes=lambda: _noise(checkpoint))
    chosen = method(METHOD)
    settings = chosen.options(OPTIONS)
    facts = facts_of(checkpoint.architecture, None)
    parts = encode_parts(chosen, settings, checkpoint, fine_tune, facts, lambda done, total: None)
    ArtifactFile(out, checkpoint, fine_tune, fingerprint(checkpoint), None, chosen, settings, ()).write(
        out, parts, None
    )


def _noise(base: Checkpoint) -> Iterator[Change]:
    generator = torch.Generator().manual_seed(0)
    for name in base.names:
        values = base.read(base.held_as(name)).float()
        fine = values + NOISE * torch.randn(values.shape, generator=generator)
        transposed = name in base.architecture.transposed
        delta = TensorDelta(name, (values, fine), transposed)
        yield Change(name, transposed, lambda delta=delta: delta)  # type: ignore[misc]
