"""The manifest: what an artifact says about itself, as JSON in its file's header."""

import json
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from deltaserve.delta_store.codec.specs import Model, SparseSpec, Spec
from deltaserve.delta_store.errors import CorruptArtifact, UnsupportedArtifact

FORMAT_VERSION = 1
LENGTH_LIMIT = 1 << 20
"""Characters. A manifest has about 2,000; the limit bounds what parsing a hostile one can allocate."""

NEWER = {"literal_error", "union_tag_invalid", "extra_forbidden"}
"""pydantic's names for values and fields that are not known here, but may be to a later version."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(Model):
    """``base`` is the base's fingerprint, ``profile`` the digest of the profile that weighted masks use.

    ``parts`` is the table that tensors' keys point into. ``tied_head``: the output head follows the embedding.
    """

    format_version: Literal[1] = 1
    base: Digest
    tied_head: bool
    profile: Digest | None
    parts: tuple[Spec, ...]
    provenance: dict[str, JsonValue]
    quality: dict[str, JsonValue] | None

    @model_validator(mode="after")
    def _has_profile(self) -> "Manifest":
        weighted = any(isinstance(spec, SparseSpec) and spec.mask == "weighted" for spec in self.parts)
        if weighted and self.profile is None:
            raise ValueError("weighted masks need a profile")
        return self

    def to_json(self) -> str:
        """Compact, with sorted keys: the same manifest always gives the same bytes."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)


class Version(BaseModel):
    """The one field that is read before anything else is believed."""

    model_config = ConfigDict(strict=True)

    format_version: Annotated[int, Field(ge=1)]


def parse(text: str) -> Manifest:
    """Raises CorruptArtifact, or UnsupportedArtifact for what a later version may know."""
    if len(text) > LENGTH_LIMIT:
        raise CorruptArtifact(f"its manifest has {len(text)} characters; the limit is {LENGTH_LIMIT}")
    try:
        version = Version.model_validate_json(text).format_version
        if version > FORMAT_VERSION:
            raise UnsupportedArtifact(
                f"it has format version {version}, known are up to {FORMAT_VERSION}; upgrade deltaserve"
            )
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = f"its manifest is not valid: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise (UnsupportedArtifact if first["type"] in NEWER else CorruptArtifact)(message) from error
    return manifest.model_copy(update={"parts": tuple(map(_only_one, manifest.parts))})


@lru_cache(maxsize=4096)
def _only_one(spec: Spec) -> Spec:
    """One object for all equal specifications: caches by specification then need not compare fields, which is slow."""
    return spec
