"""Which variants exist and which version each name points at.

A variant has versions; each is immutable and is named by its artifact's digest. The variant's name points at one, and
may send a share of its requests to a second one, the canary. Registering adds a version and turns the name to it in one
step, so that whoever asks sees the old one or the new one. Bytes that a variant already had are the same version:
registering them again turns the name back to it.
"""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from deltaserve.delta_store.errors import InvalidName, OptionError, VariantNotFound, VersionNotFound

MAX_NAME_LENGTH = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the check of an uploaded artifact found: kept with its version, and told to whoever sent it.

    ``base`` is the fingerprint of the base it was made for, ``profile`` the digest of the activation profile that its
    masks need, ``tensors_applied`` of ``tensors_total`` are parameters that the served model has a layer for,
    ``quality`` is the report stored in the artifact, ``uploaded_by`` the name of the API key that it came with.
    """

    digest: str
    size_bytes: int
    base: str
    profile: str | None
    tensors_applied: int
    tensors_total: int
    quality: dict[str, Any] | None = None
    uploaded_by: str | None = None

    def to_json(self) -> str:
        """As text, for a registry's own storage."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Receipt":
        """What ``to_json`` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Registered:
    """One version of a variant. ``number`` counts from 1 in each variant, ``created`` is in seconds since 1970."""

    variant: str
    number: int
    created: float
    receipt: Receipt

    @property
    def digest(self) -> str:
        return self.receipt.digest


@dataclass(frozen=True, slots=True)
class Pointer:
    """Where a name points: ``canary``, if there is one, gets ``share`` of the requests, in (0, 1)."""

    current: Registered
    canary: Registered | None = None
    share: float = 0.0

    def choose(self, key: str | None) -> Registered:
        """The version for one request: always the same one for the same ``key``, drawn at random without one."""
        if self.canary is None:
            return self.current
        return self.canary if _position(self.current.variant, key) < self.share else self.current


class Registry(Protocol):
    """Calls are atomic, block for milliseconds, and raise RegistryUnavailable if the store behind does not answer."""

    def register(self, variant: str, receipt: Receipt) -> Registered:
        """Add a version and turn the name to it, which ends a split. Raises InvalidName."""

    def point(self, variant: str, digest: str, canary: str | None = None, share: float = 0.0) -> Pointer:
        """Turn the name to one version that it has, or to two. Raises VariantNotFound, VersionNotFound, OptionError."""

    def pointer(self, variant: str) -> Pointer:
        """Where the name points. Raises VariantNotFound."""

    def current(self, variant: str) -> Registered:
        """The version that the name points at, whatever the canary. Raises VariantNotFound."""

    def versions(self, variant: str) -> Sequence[Registered]:
        """All versions, newest first. Raises VariantNotFound."""

    def variants(self) -> Sequence[Registered]:
        """The current version of every variant, by name."""

    def remove(self, variant: str) -> None:
        """Forget the variant with all its versions. Raises VariantNotFound."""

    def digests(self) -> set[str]:
        """The artifacts that some version needs."""

    def check(self) -> None:
        """Raise RegistryUnavailable if the store behind does not answer now."""

    def close(self) -> None:
        """Let go of files and connections."""


def check_name(variant: str) -> str:
    """The name, if a variant can have it.

    Letters, digits, ``.``, ``_`` and ``-``, in parts joined by ``/`` that begin with a letter or digit; at most 128
    characters. So every name is safe in a URL and in a log, as it is. Raises InvalidName.
    """
    if len(variant) > MAX_NAME_LENGTH:
        raise InvalidName(f"A variant's name has at most {MAX_NAME_LENGTH} characters; this one has {len(variant)}")
    if not _NAME.fullmatch(variant):
        raise InvalidName(
            f"{variant!r} cannot be a variant's name: use letters, digits, '.', '_' and '-', in parts joined by '/', "
            "each beginning with a letter or digit"
        )
    return variant


def check_split(digest: str, canary: str | None, share: float) -> None:
    """Raise OptionError for a split that is none."""
    if canary is None:
        if share:
            raise OptionError(f"A share of {share:g} needs a canary; name its digest")
    elif canary == digest or not 0 < share < 1:
        raise OptionError(
            f"A split needs two versions and a share between 0 and 1, exclusive; got {digest[:12]} and {canary[:12]}, "
            f"share {share:g}"
        )


def variant_not_found(variant: str) -> VariantNotFound:
    """There is no variant of this name."""
    return VariantNotFound(f"There is no variant {variant!r}; GET /v1/variants lists those there are")


def version_not_found(variant: str, digest: str) -> VersionNotFound:
    """The variant is there, and never had these bytes."""
    return VersionNotFound(
        f"The variant {variant!r} has no version {digest[:64]}; GET /v1/variants/{variant}/versions lists those it has"
    )


def _position(variant: str, key: str | None) -> float:
    """A number in [0, 1): of the key's own, so that a user stays with a version while its share grows."""
    if key is None:
        return random.random()
    return int.from_bytes(hashlib.blake2b(f"{variant}/{key}".encode(), digest_size=6).digest()) / 2**48
