"""An artifact on its way to its file: what goes in beside the parts, and drafts of it to measure."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import JsonValue

from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.codec.artifact import Artifact, open_artifact, write_artifact
from deltaserve.delta_store.codec.parts import Stored
from deltaserve.delta_store.codec.specs import SparseSpec, Spec
from deltaserve.delta_store.fine_tune import FineTune
from deltaserve.delta_store.heads import config_file
from deltaserve.delta_store.profile import Profile
from deltaserve.delta_store.pruning.methods import Method
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.variant_files import differing_files

Parts = list[tuple[str, Spec, Stored]]
"""By parameter name, what stands for its delta."""


@dataclass(frozen=True, slots=True, eq=False)
class ArtifactFile:
    """Everything about an artifact that is to be written to ``out`` but its parts and their quality.

    ``q`` is what a search divided survivors by, beside their probability.
    """

    out: Path
    base: Checkpoint
    fine_tune: FineTune
    base_fingerprint: str
    profile: Profile | None
    method: Method
    options: Options
    warnings: tuple[str, ...]
    q: float = 1.0

    def write(self, path: Path, parts: Parts, quality: dict[str, JsonValue] | None) -> str:
        """Returns the digest."""
        return write_artifact(
            path,
            base=self.base_fingerprint,
            tied_head=self.fine_tune.tied_head,
            parts=parts,
            profile=self.profile.digest if self.profile else None,
            provenance=self._provenance(),
            quality=quality,
            files=differing_files(self.base.folder, self.fine_tune.folder)
            | config_file(self.base.architecture, self.fine_tune.architecture),
        )

    @contextmanager
    def draft(self, parts: Parts) -> Iterator[Artifact]:
        """The artifact as far as it is known, in a file beside ``out`` that is gone afterwards."""
        path = self.out.with_name(f".{self.out.name}.{os.getpid()}.draft")
        try:
            self.write(path, parts, None)
            yield open_artifact(path)
        finally:
            path.unlink(missing_ok=True)

    def _provenance(self) -> dict[str, JsonValue]:
        """How the artifact came to be; no times and no paths, so that the same work gives the same file."""
        return {
            "method": self.method.name,
            "options": {name: getattr(self.options, name) for name in self.method.defaults},
            **({} if self.q == 1 else {"q": self.q}),
            "base": self.base.folder.name,
            "fine_tuned": self.fine_tune.folder.name,
            "dtype": str(self.fine_tune.dtype).removeprefix("torch."),
            "parameters": self.fine_tune.parameters,
            "warnings": list(self.warnings),
            "deltaserve": deltaserve_version(),
        }


def is_weighted(parts: Parts) -> bool:
    """Whether serving these parts needs the profile."""
    return any(isinstance(spec, SparseSpec) and spec.mask == "weighted" for _, spec, _ in parts)


def deltaserve_version() -> str:
    """Of the installed package."""
    try:
        return version("deltaserve")
    except PackageNotFoundError:
        return "from source"
