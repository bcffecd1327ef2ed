"""The registry that a setting names."""

from pathlib import Path

from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.registry import Registry
from deltaserve.delta_store.registry.sqlite import SqliteRegistry


def open_registry(address: str, file: Path, prefix: str) -> Registry:
    """``sqlite``: the one in ``file``; the address of a Redis database: the one below ``prefix`` in it.

    Raises OptionError for any other address, RegistryUnavailable if nothing answers there.
    """
    if address == "sqlite":
        return SqliteRegistry(file)
    if address.partition("://")[0] not in ("redis", "rediss", "unix"):
        raise OptionError(f"{address!r} is no registry; use sqlite, or redis://HOST:PORT/DATABASE")
    try:
        from deltaserve.delta_store.registry.redis import RedisRegistry
    except ModuleNotFoundError as error:
        raise OptionError("A registry in Redis needs the package redis: pip install 'deltaserve[redis]'") from error
    return RedisRegistry(address, prefix)
