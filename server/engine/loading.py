"""From a version's artifact on disk to the deltas that the layers take."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.codec.artifact import Artifact, open_artifact
from deltaserve.delta_store.codec.specs import XorSpec
from deltaserve.delta_store.errors import BaseMismatch, CorruptArtifact, ProfileMissing
from deltaserve.delta_store.profile import Profile
from deltaserve.kernels.parts import Delta
from deltaserve.server.engine.requests import Version
from deltaserve.server.engine.wrapped import VersionDeltas

ProfilePath = Callable[[str], Path]
"""Where the activation profile with this digest is, if it is there."""


class ArtifactLoader:
    """Opens artifacts made for one base, whose tensors lossless deltas are decoded beside."""

    def __init__(self, base: Checkpoint, fingerprint: str, profile_path: ProfilePath | None) -> None:
        self._base, self._fingerprint, self._profile_path = base, fingerprint, profile_path

    def __call__(self, version: Version) -> VersionDeltas:
        """Raises ArtifactError: missing, damaged, another version's bytes, of another base, without its profile."""
        path = Path(version.path)
        if not path.is_file():
            raise CorruptArtifact(f"The artifact of variant {version.variant!r} is not at {path}; upload it again")
        artifact = open_artifact(path, verify=version.digest)
        self.check_base(artifact)
        return VersionDeltas(self.deltas(artifact), artifact.manifest.tied_head, stop_ids(artifact))

    def check_base(self, artifact: Artifact) -> None:
        """Raise BaseMismatch for an artifact that was made for another base."""
        if artifact.manifest.base != self._fingerprint:
            raise BaseMismatch(
                f"{artifact.path} was made for the base {artifact.manifest.base[:12]}, the one served here is "
                f"{self._fingerprint[:12]}; compress the fine-tune against this base"
            )

    def deltas(self, artifact: Artifact) -> Iterator[tuple[str, Delta]]:
        """Every parameter of the artifact with its decoded delta, one at a time."""
        profile = self._profile(artifact)
        for name in artifact.names:
            is_lossless = any(isinstance(spec, XorSpec) for spec in artifact.specs(name))
            yield name, artifact.delta(name, profile, self.base_tensor(name) if is_lossless else None)

    def base_tensor(self, name: str) -> Tensor:
        """A parameter of the base from its checkpoint; a linear layer's is ``[out, in]``."""
        tensor = self._base.read(self._base.held_as(name))
        return tensor.T.contiguous() if name in self._base.architecture.transposed else tensor

    def _profile(self, artifact: Artifact) -> Profile | None:
        digest = artifact.manifest.profile
        if digest is None:
            return None
        path = self._profile_path(digest) if self._profile_path is not None else None
        if path is None or not path.is_file():
            raise ProfileMissing(
                f"{artifact.path} needs the activation profile {digest}, which is not in the store; upload it first",
                digest,
            )
        return Profile.open(path)


def stop_ids(artifact: Artifact) -> frozenset[int] | None:
    """The end-of-sequence tokens of the generation config that the artifact brings, None if it brings none."""
    if "generation_config.json" not in artifact.file_names:
        return None
    try:
        ids = json.loads(artifact.files["generation_config.json"]).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise CorruptArtifact(f"{artifact.path}: its generation_config.json is not valid: {error}") from error
    return None if ids is None else frozenset([ids] if isinstance(ids, int) else ids)
