"""Which variants exist and which version each name points at.

A variant has versions; each is immutable and is named by its artifact's digest. The variant's name points at one.
Registering adds a version and turns the name to it in one step, so that whoever asks sees the old one or the new one.
Bytes that a variant already had are the same version: registering them again turns the name back to it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deltaserve.delta_store.errors import InvalidName

MAX_NAME_LENGTH = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the check of an uploaded artifact found: kept with its version, and told to whoever sent it.

    ``base`` is the fingerprint of the base it was made for, ``profile`` the digest of the activation profile that its
    masks need, ``tensors_applied`` of ``tensors_total`` are parameters that the served model has a layer for,
    ``quality`` is the report stored in the artifact.
    """

    digest: str
    size_bytes: int
    base: str
    profile: str | None
    tensors_applied: int
    tensors_total: int
    quality: dict[str, Any] | None = None


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


class Registry(Protocol):
    """Calls are atomic, block for milliseconds, and raise RegistryUnavailable if the store behind does not answer."""

    def register(self, variant: str, receipt: Receipt) -> Registered:
        """Add a version and turn the name to it. Raises InvalidName."""

    def current(self, variant: str) -> Registered:
        """The version that the name points at. Raises VariantNotFound."""

    def versions(self, variant: str) -> Sequence[Registered]:
        """All versions, newest first. Raises VariantNotFound."""

    def variants(self) -> Sequence[Registered]:
        """The current version of every variant, by name."""

    def remove(self, variant: str) -> None:
        """Forget the variant with all its versions. Raises VariantNotFound."""

    def digests(self) -> set[str]:
        """The artifacts that some version needs."""

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
