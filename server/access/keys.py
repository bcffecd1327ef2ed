"""API keys: who holds one, what it allows, and only a hash of it at rest.

A key is ``sk-<id>-<secret>``. The secret has 256 random bits, so one round of SHA-256 hides it; a slow hash is for
secrets that people choose. The id is no secret: lists, logs and usage show it.
"""

import hashlib
import hmac
import json
import secrets
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from deltaserve.delta_store.errors import KeyNotFound, OptionError
from deltaserve.delta_store.sqlite_file import SqliteFile

Role = Literal["infer", "admin"]

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE keys (
            id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            role TEXT NOT NULL,
            models TEXT,
            requests INTEGER,
            tokens INTEGER,
            concurrent INTEGER,
            hash TEXT NOT NULL,
            created REAL NOT NULL,
            revoked REAL
        )""",
        """CREATE TABLE variant_limits (
            model TEXT PRIMARY KEY,
            requests INTEGER,
            tokens INTEGER,
            concurrent INTEGER
        )""",
    ),
)
"""A step that was released is never edited."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The most requests and tokens a minute, and requests at once; None is no limit."""

    requests: int | None = None
    tokens: int | None = None
    concurrent: int | None = None

    def over(self, defaults: "Limits") -> "Limits":
        """These, and where they say nothing the defaults."""
        return Limits(
            defaults.requests if self.requests is None else self.requests,
            defaults.tokens if self.tokens is None else self.tokens,
            defaults.concurrent if self.concurrent is None else self.concurrent,
        )


@dataclass(frozen=True, slots=True)
class Key:
    """``models`` are names or patterns (``team/*``) of what it may ask, None is everything; times in Unix seconds."""

    id: str
    name: str
    role: Role
    models: tuple[str, ...] | None
    limits: Limits
    created: float
    revoked: float | None = None

    def may_use(self, model: str) -> bool:
        """Whether a request may name this model."""
        return self.models is None or any(fnmatchcase(model, pattern) for pattern in self.models)


class KeyStore:
    """Keys and the variants' own limits, in one SQLite file; changes by another process are seen at once.

    Raises RegistryUnavailable if the file does not answer.
    """

    def __init__(self, path: Path) -> None:
        self._file = SqliteFile(path, MIGRATIONS)
        self._changes = 0
        self._seen: tuple[int, int] | None = None
        self._keys: dict[str, tuple[Key, str]] = {}
        self._limits: dict[str, Limits] = {}

    def create(
        self, name: str, role: Role = "infer", models: Sequence[str] | None = None, limits: Limits | None = None
    ) -> tuple[Key, str]:
        """A new key, and its text, which cannot be had again. Raises OptionError."""
        if not name.strip():
            raise OptionError("A key needs a name, that of whoever or whatever uses it")
        if role not in ("infer", "admin"):
            raise OptionError(f"Unknown role {role!r}; known are infer, admin")
        limits = limits or Limits()
        key_id = secrets.token_hex(6)
        text = f"sk-{key_id}-{secrets.token_urlsafe(32)}"
        allowed = None if models is None else tuple(models)
        key = Key(key_id, name, role, allowed, limits, time.time())
        with self._file.transaction() as run:
            run.execute(
                "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (
                    *(key_id, name, role, None if allowed is None else json.dumps(allowed)),
                    *(limits.requests, limits.tokens, limits.concurrent, digest(text), key.created),
                ),
            )
        self._changes += 1
        return key, text

    def find(self, text: str) -> Key | None:
        """The key with this text, None if there is none or it was revoked. Takes equally long for any wrong secret."""
        self._refresh()
        found = self._keys.get(text.partition("-")[2].partition("-")[0])
        key, expected = found if found is not None else (None, _NOBODY)
        matches = hmac.compare_digest(digest(text), expected)
        return key if matches and key is not None and key.revoked is None else None

    def listed(self) -> list[Key]:
        """All keys, revoked ones too, oldest first."""
        self._refresh()
        return [key for key, _ in self._keys.values()]

    def exist(self) -> bool:
        """Whether there ever was a key: revoking the last one does not open the server."""
        self._refresh()
        return bool(self._keys)

    def revoke(self, key_id: str) -> Key:
        """Let the key open nothing from now on. Raises KeyNotFound."""
        with self._file.transaction() as run:
            changed = run.execute(
                "UPDATE keys SET revoked = COALESCE(revoked, ?) WHERE id = ?", (time.time(), key_id)
            ).rowcount
        if not changed:
            raise KeyNotFound(f"There is no key {key_id!r}; its id is the part between 'sk-' and the next '-'")
        self._changes += 1
        return next(key for key in self.listed() if key.id == key_id)

    def variant_limits(self) -> dict[str, Limits]:
        """The limits of variants that have some of their own, by name."""
        self._refresh()
        return self._limits

    def limit_variant(self, model: str, limits: Limits) -> None:
        """Give a variant limits of its own; none at all takes them away."""
        with self._file.transaction() as run:
            run.execute("DELETE FROM variant_limits WHERE model = ?", (model,))
            if limits != Limits():
                row = (model, limits.requests, limits.tokens, limits.concurrent)
                run.execute("INSERT INTO variant_limits VALUES (?, ?, ?, ?)", row)
        self._changes += 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _refresh(self) -> None:
        """Read the file again if it has changed."""
        now = (self._file.data_version(), self._changes)  # by others, by this object
        if now == self._seen:
            return
        with self._file.transaction("DEFERRED") as run:
            rows = run.execute("SELECT * FROM keys ORDER BY created").fetchall()
            limits = run.execute("SELECT * FROM variant_limits").fetchall()
        self._keys = {row["id"]: (_key(row), row["hash"]) for row in rows}
        self._limits = {row["model"]: _limits(row) for row in limits}
        self._seen = now


def digest(text: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(text.encode()).hexdigest()


_NOBODY = digest("")


def _key(row: sqlite3.Row) -> Key:
    models = None if row["models"] is None else tuple(json.loads(row["models"]))
    return Key(row["id"], row["name"], row["role"], models, _limits(row), row["created"], row["revoked"])


def _limits(row: sqlite3.Row) -> Limits:
    return Limits(row["requests"], row["tokens"], row["concurrent"])
