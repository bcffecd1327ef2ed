"""From a version's artifact on disk to the deltas that the layers take, in slices that leave room for running streams.

Opened artifacts are remembered, the longest unused forgotten first: checked against their digest and parsed, with their
files in the system's cache as long as it likes. So a version that left the bank comes back without being read again.
"""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.codec.artifact import Artifact, open_artifact
from deltaserve.delta_store.codec.mapped import MappedTensors
from deltaserve.delta_store.codec.specs import XorSpec
from deltaserve.delta_store.errors import BaseMismatch, CorruptArtifact, ProfileMissing
from deltaserve.delta_store.profile import Profile
from deltaserve.kernels.parts import Delta
from deltaserve.server.engine.requests import Version
from deltaserve.server.engine.wrapped import VersionDeltas

ProfilePath = Callable[[str], Path]
"""Where the activation profile with this digest is, if it is there."""


SLICE_S, PAUSE_S = 0.005, 0.001
"""A load gives up the processor for a moment after so much of its time. A slice is one tensor at least."""


class OpenArtifacts:
    """The host tier: artifacts that were opened, up to ``budget_bytes`` of their files. For many threads."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._known: OrderedDict[str, tuple[Artifact, tuple[int, int, int]]] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, digest: str) -> bool:
        return digest in self._known

    def open(self, path: Path, digest: str) -> Artifact:
        """The artifact with this digest. Raises ArtifactError."""
        with self._lock:
            artifact, state = self._known.pop(digest, (None, (0, 0, 0)))
        now = _state(path)
        if artifact is None or now != state:
            artifact = replace(open_artifact(path, verify=digest), reader=None)
        with self._lock:
            self._known[digest] = artifact, now
            while sum(state[-1] for _, state in self._known.values()) > self._budget_bytes:
                self._known.popitem(last=False)
        return replace(artifact, reader=MappedTensors(path))  # anew: pages once read count as memory

    def forget(self, digest: str) -> None:
        with self._lock:
            self._known.pop(digest, None)


def _state(path: Path) -> tuple[int, int, int]:
    """What changes when a file does; its size last."""
    state = path.stat()
    return state.st_ino, state.st_mtime_ns, state.st_size


class ArtifactLoader:
    """Opens artifacts made for one base, whose tensors lossless deltas are decoded beside.

    ``host_bytes`` bounds the files of the artifacts that stay open.
    """

    def __init__(
        self, base: Checkpoint, fingerprint: str, profile_path: ProfilePath | None, host_bytes: int = 0
    ) -> None:
        self._base, self._fingerprint, self._profile_path = base, fingerprint, profile_path
        self.opened = OpenArtifacts(host_bytes)
        self.is_disturbing: Callable[[], bool] = lambda: False
        """Whether a load takes time from running requests."""

    def __call__(self, version: Version) -> VersionDeltas:
        """What the layers take. Raises as ``open``, and for an artifact whose profile is not there."""
        artifact = self.open(version)
        return VersionDeltas(self.deltas(artifact), artifact.manifest.tied_head, stop_ids(artifact))

    def open(self, version: Version) -> Artifact:
        """A version's artifact. Raises ArtifactError: missing, damaged, another version's bytes, of another base."""
        path = Path(version.path)
        if not path.is_file():
            raise CorruptArtifact(f"The artifact of variant {version.variant!r} is not at {path}; upload it again")
        artifact = self.opened.open(path, version.digest)
        self.check_base(artifact)
        return artifact

    def check_base(self, artifact: Artifact) -> None:
        """Raise BaseMismatch for an artifact that was made for another base."""
        if artifact.manifest.base != self._fingerprint:
            raise BaseMismatch(
                f"{artifact.path} was made for the base {artifact.manifest.base[:12]}, the one served here is "
                f"{self._fingerprint[:12]}; compress the fine-tune against this base"
            )

    def deltas(self, artifact: Artifact) -> Iterator[tuple[str, Delta]]:
        """Every parameter of the artifact with its decoded delta, one at a time, in slices."""
        return self._in_slices(self._decoded(artifact))

    def _decoded(self, artifact: Artifact) -> Iterator[tuple[str, Delta]]:
        profile = self._profile(artifact)
        for name in artifact.names:
            is_lossless = any(isinstance(spec, XorSpec) for spec in artifact.specs(name))
            yield name, artifact.delta(name, profile, self.base_tensor(name) if is_lossless else None)

    def _in_slices(self, deltas: Iterator[tuple[str, Delta]]) -> Iterator[tuple[str, Delta]]:
        """The same, with a pause after each slice: other threads that want the interpreter get it at once."""
        began = time.thread_time()
        for one in deltas:
            yield one
            if time.thread_time() - began > SLICE_S and self.is_disturbing():
                time.sleep(PAUSE_S)
                began = time.thread_time()

    def base_tensor(self, name: str) -> Tensor:
        """A parameter of the base from its checkpoint; a linear layer's is ``[out, in]``."""
        tensor = self._base.read(self._base.held_as(name))
        return tensor.T.contiguous() if name in self._base.architecture.transposed else tensor

    def profile_path(self, version: Version) -> Path | None:
        """Where the profile is that a version needs, None if it needs none. Raises as a load of it would."""
        return self._find_profile(self.open(version))

    def _profile(self, artifact: Artifact) -> Profile | None:
        path = self._find_profile(artifact)
        return None if path is None else _profile_at(path)

    def _find_profile(self, artifact: Artifact) -> Path | None:
        digest = artifact.manifest.profile
        if digest is None:
            return None
        path = self._profile_path(digest) if self._profile_path is not None else None
        if path is None or not path.is_file():
            raise ProfileMissing(
                f"{artifact.path} needs the activation profile {digest}, which is not in the store; upload it first",
                digest,
            )
        return path


@lru_cache(maxsize=4)
def _profile_at(path: Path) -> Profile:
    """A profile's file never changes: its name is its digest."""
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
