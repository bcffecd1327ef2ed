"""What an artifact must pass before it is registered, so that no request ever meets a version that cannot be served."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from deltaserve.delta_store.blobs import BlobStore
from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import Artifact, open_artifact
from deltaserve.delta_store.errors import BaseMismatch, CorruptArtifact, ProfileMissing, UnsupportedArtifact
from deltaserve.delta_store.profile import Profile
from deltaserve.delta_store.registry import Receipt
from deltaserve.kernels.reference import unpack

if TYPE_CHECKING:
    from deltaserve.server.engine.engine import Engine

PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""First bytes of what torch.save writes: a zip archive, or in old versions a bare pickle."""


def examine(file: Path, engine: "Engine", base: str, profiles: BlobStore) -> Receipt:
    """Decode every tensor of the artifact once. ``base`` is the served checkpoint, ``profiles`` those that were sent.

    Raises the ArtifactError that says what is wrong with it.
    """
    refuse_pickle(file)
    artifact = open_artifact(file)
    if artifact.manifest.base != engine.fingerprint:
        raise BaseMismatch(
            f"The artifact was made for base {artifact.manifest.base[:12]}, this server has {engine.fingerprint[:12]}; "
            "compress the fine-tune against the base that is served"
        )
    applied = engine.check_fits(artifact)
    decode_all(artifact, base, open_profile(artifact.manifest.profile, profiles))
    return Receipt(
        digest=artifact.digest,
        size_bytes=file.stat().st_size,
        base=artifact.manifest.base,
        profile=artifact.manifest.profile,
        tensors_applied=applied,
        tensors_total=len(artifact.names),
        quality=artifact.manifest.quality,
    )


def refuse_pickle(file: Path) -> None:
    """Raise UnsupportedArtifact for what torch.save wrote: it could run any program when opened."""
    with file.open("rb") as opened:
        if opened.read(4).startswith(PICKLES):
            raise UnsupportedArtifact(
                "This is a pickle (a .bin, .pt or .pth file), which deltaserve never opens; send what deltaserve "
                "compress wrote, or an adapter as safetensors"
            )


def open_profile(digest: str | None, profiles: BlobStore) -> Profile | None:
    """The profile that an artifact names, if it names one."""
    if digest is None:
        return None
    if not profiles.path(digest).exists():
        raise ProfileMissing(how_to_send(digest), digest)
    return Profile.open(profiles.path(digest))


def how_to_send(digest: str) -> str:
    """What to do about a profile that the server lacks."""
    return (
        f"The server lacks activation profile {digest}; send its file with "
        f"curl -T profile-{digest}.safetensors URL/v1/profiles/{digest}, or use deltaserve push, which does"
    )


def decode_all(artifact: Artifact, base: str, profile: Profile | None) -> None:
    """Raise CorruptArtifact if a tensor cannot be decoded or holds a number that is not finite."""
    checkpoint = open_checkpoint(base)
    for name in artifact.names:
        delta = artifact.delta(name, profile, checkpoint.read(name))
        if not torch.isfinite(unpack(delta)).all():
            raise CorruptArtifact(f"Tensor {name} of the artifact has values that are not finite; compress again")
