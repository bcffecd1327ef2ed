"""What an artifact must pass before it is registered, so that no request ever meets a version that cannot be served."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from deltaserve.delta_store.blobs import BlobStore
from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import Artifact, open_artifact
from deltaserve.delta_store.errors import DeltaServeError, ProfileMissing, UnsupportedArtifact
from deltaserve.delta_store.registry import Receipt
from deltaserve.server.engine.loading import ArtifactLoader

if TYPE_CHECKING:
    from deltaserve.server.engine.engine import Engine

PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""First bytes of what torch.save writes: a zip archive, or in old versions a bare pickle."""

MAPPED_BYTES = 4 * 2**20
"""Read pages of a mapped file count as resident until it is closed: it is opened anew after about so many bytes."""


def examine(file: Path, engine: "Engine", base: str, profiles: BlobStore) -> Receipt:
    """Decode every tensor of an uploaded artifact once, as it will be for a request. ``base`` is the served checkpoint.

    Raises the ArtifactError that says what is wrong with it.
    """
    refuse_pickle(file)
    with told_of_the_upload(file):
        artifact = open_artifact(file)
        fit = engine.check_fits(artifact)
        check_profile(artifact.manifest.profile, profiles)
        loader = ArtifactLoader(open_checkpoint(base), engine.fingerprint, profiles.fetched)
        for some in portions(artifact):
            deque(loader.deltas(some), maxlen=0)  # keeps none of them, as a tensor keeps its file mapped
    return Receipt(
        digest=artifact.digest,
        size_bytes=file.stat().st_size,
        base=artifact.manifest.base,
        profile=artifact.manifest.profile,
        tensors_applied=fit.applied,
        tensors_total=fit.total,
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


@contextmanager
def told_of_the_upload(file: Path) -> Iterator[None]:
    """Messages speak of the upload, not of a path on the server that its sender does not know."""
    try:
        yield
    except DeltaServeError as error:
        error.args = (str(error).replace(str(file), "the upload"),)
        raise


def check_profile(digest: str | None, profiles: BlobStore) -> None:
    """Raise ProfileMissing for a profile that an artifact names and nobody sent yet."""
    if digest is not None and not profiles.fetched(digest).exists():
        raise ProfileMissing(how_to_send(digest), digest)


def how_to_send(digest: str) -> str:
    """What to do about a profile that the server lacks."""
    return (
        f"The server lacks activation profile {digest}; send its file with "
        f"curl -T profile-{digest}.safetensors URL/v1/profiles/{digest}, or use deltaserve push, which does"
    )


def portions(artifact: Artifact) -> Iterator[Artifact]:
    """The artifact, some tensors at a time, each time with the file mapped anew."""
    names, mapped = [], 0
    for name in artifact.names:
        names.append(name)
        mapped += sum(artifact.part_bytes(name))
        if mapped >= MAPPED_BYTES or name == artifact.names[-1]:
            yield replace(
                artifact, keys={one: artifact.keys[one] for one in names}, reader=safe_open(artifact.path, "pt")
            )
            names, mapped = [], 0
