"""The activation profile of a base: for each weight, how strongly each of its input columns is driven.

Weighted drop draws its columns from it, so compressing and serving must see the very same numbers. It is therefore
stored as whole numbers, one byte a column, in a safetensors file that is named by its digest and never rewritten.

A byte ``c`` stands for the weight ``(16 + (c & 15)) << (c >> 4)``: 256 values from 16 to 1015808, 3 to 6 % apart, exact
on every machine. The strongest column of a vector has the largest weight; a column 63,000 times weaker or more has
weight 16, so every column can be drawn.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from deltaserve.delta_store.cache_folder import cache_folder
from deltaserve.delta_store.codec.artifact import Artifact
from deltaserve.delta_store.errors import CorruptArtifact, ProfileMissing, UnsupportedArtifact

FORMAT_VERSION = 1
METADATA_KEY = "deltaserve_profile"
LARGEST_WEIGHT = 31 << 15
WEIGHTS = np.array([(16 + (code & 15)) << (code >> 4) for code in range(256)], np.int64)
"""By code."""


class Header(BaseModel):
    """The metadata of a profile's file. ``source`` says in words which text was run."""

    format_version: int
    base: str
    source: str
    vector_of: dict[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """A base's profile. ``digest`` is the SHA-256 of its file in hex, ``base`` the fingerprint of its base.

    ``vectors`` are uint8 codes ``[in]``; ``vector_of`` says which one a parameter uses (q, k and v read one input).
    """

    digest: str
    base: str
    vectors: Mapping[str, Tensor]
    vector_of: Mapping[str, str]
    _weights: dict[str, Tensor] = field(default_factory=dict, init=False)

    @classmethod
    def open(cls, path: str | Path) -> "Profile":
        """Read a profile's file. Raises CorruptArtifact or UnsupportedArtifact where it is none."""
        return cls.from_bytes(Path(path).read_bytes(), str(path))

    @classmethod
    def from_bytes(cls, data: bytes, path: str = "profile") -> "Profile":
        """The same from the file's bytes; ``path`` is for messages."""
        try:
            vectors = load(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            header = Header.model_validate_json(metadata[METADATA_KEY])
        except (SafetensorError, ValidationError, KeyError) as error:
            raise CorruptArtifact(f"{path} is damaged or not an activation profile ({error}); make it again") from error
        if header.format_version != FORMAT_VERSION:
            known = f"known are up to {FORMAT_VERSION}; upgrade deltaserve"
            raise UnsupportedArtifact(f"{path} has profile format {header.format_version}, {known}")
        if not set(header.vector_of.values()) <= vectors.keys() or any(
            v.dtype != torch.uint8 for v in vectors.values()
        ):
            raise CorruptArtifact(f"{path} is damaged: its vectors and its list of parameters disagree; make it again")
        return cls(hashlib.sha256(data).hexdigest(), header.base, vectors, header.vector_of)

    def __contains__(self, name: str) -> bool:
        """Whether calibration text reached the layer of parameter ``name``."""
        return name in self.vector_of

    def weights(self, name: str) -> Tensor:
        """int64 ``[in]``, each at least 16: the weights of the input columns of parameter ``name``, which is in it.

        Remembered, since every load of a variant asks for all of them; not to be written to.
        """
        vector = self.vector_of[name]
        if (weights := self._weights.get(vector)) is None:
            weights = self._weights[vector] = torch.from_numpy(WEIGHTS[self.vectors[vector].numpy()])
        return weights


def write_profile(
    folder: Path, base: str, rms: Mapping[str, Tensor], vector_of: Mapping[str, str], source: str
) -> Profile:
    """Encode float vectors ``rms[key]`` ``[in]`` and write them into ``folder`` under their digest.

    The same input gives the same file.
    """
    header = Header(format_version=FORMAT_VERSION, base=base, source=source, vector_of=dict(sorted(vector_of.items())))
    data = save({key: encode(values) for key, values in rms.items()}, {METADATA_KEY: header.model_dump_json()})
    profile = Profile.from_bytes(data)
    write_whole(folder / file_name(profile.digest), data)
    return profile


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there with all of its bytes or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def encode(rms: Tensor) -> Tensor:
    """uint8 ``[in]``: for each float the code of the nearest weight, the largest being scaled to the largest weight."""
    scaled = rms.double() / rms.double().max().clamp_min(1e-300) * LARGEST_WEIGHT
    exponent = (scaled / 16).clamp_min(1).log2().floor().clamp(0, 15)
    mantissa = (scaled / 2**exponent).round().clamp(16, 32)
    carried = mantissa == 32
    exponent, mantissa = exponent + carried, torch.where(carried, 16, mantissa)
    return (exponent * 16 + mantissa - 16).clamp(max=255).to(torch.uint8)


def file_name(digest: str) -> str:
    """The file name of the profile with this digest, in the cache and beside artifacts."""
    return f"profile-{digest}.safetensors"


def find_profile(digest: str, *folders: Path) -> Profile:
    """The profile with this digest, from the first of ``folders`` that has it; or ProfileMissing, CorruptArtifact."""
    for path in (folder / file_name(digest) for folder in folders):
        if path.exists():
            profile = Profile.open(path)
            if profile.digest != digest:
                raise CorruptArtifact(
                    f"{path} is damaged: its digest is {profile.digest}; delete it and compress again"
                )
            return profile
    places = " or ".join(str(folder) for folder in folders)
    raise ProfileMissing(f"The artifact needs {file_name(digest)}, which is not in {places}; copy it there", digest)


def profile_folder() -> Path:
    """Where compressing keeps the profiles that it made; without them their artifacts cannot be decoded."""
    return cache_folder()


def profile_of(artifact: Artifact) -> Profile | None:
    """The profile that an artifact needs, from beside it or from where compressing keeps them; or ProfileMissing."""
    digest = artifact.manifest.profile
    return None if digest is None else find_profile(digest, artifact.path.absolute().parent, profile_folder())
