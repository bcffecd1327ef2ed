"""What is the SQLite registry's own: its file and migrations (test_registry.py has what every registry does)."""

import sqlite3

import pytest

from deltaserve.delta_store.errors import RegistryUnavailable
from deltaserve.delta_store.registry import Receipt
from deltaserve.delta_store.registry.migrations import MIGRATIONS
from deltaserve.delta_store.registry.sqlite import SqliteRegistry


@pytest.fixture
def file(tmp_path):
    return tmp_path / "registry.sqlite3"


@pytest.fixture
def registry(file):
    registry = SqliteRegistry(file)
    yield registry
    registry.close()


def receipt(number: int) -> Receipt:
    return Receipt(f"{number:064x}", 1000 + number, "b" * 64, None, 3, 3, {"kl": 0.5})


def test_each_migration_is_recorded_once(registry, file):
    SqliteRegistry(file).close()
    with sqlite3.connect(file) as connection:
        numbers = [row[0] for row in connection.execute("SELECT number FROM migrations ORDER BY number")]
    assert numbers == list(range(1, len(MIGRATIONS) + 1))


def test_a_migration_that_fails_leaves_nothing_of_itself(file, monkeypatch):
    broken = (*MIGRATIONS, ("CREATE TABLE half (x)", "CREATE TABLE half (x)"))
    monkeypatch.setattr("deltaserve.delta_store.registry.sqlite.MIGRATIONS", broken)
    with pytest.raises(RegistryUnavailable, match="half"):
        SqliteRegistry(file)
    monkeypatch.undo()
    registry = SqliteRegistry(file)
    registry.register("v", receipt(1))
    registry.close()
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT name FROM sqlite_master WHERE name = 'half'").fetchall() == []


def test_a_file_of_a_newer_deltaserve_is_refused(registry, file):
    with sqlite3.connect(file) as connection:
        connection.execute("INSERT INTO migrations VALUES (99, 0)")
    with pytest.raises(RegistryUnavailable, match="newer deltaserve"):
        SqliteRegistry(file)


def test_what_is_no_database_is_refused_by_name(file):
    file.write_bytes(b"not a database" * 100)
    with pytest.raises(RegistryUnavailable, match=r"registry\.sqlite3.*not a database") as raised:
        SqliteRegistry(file)
    assert isinstance(raised.value.__cause__, sqlite3.Error)


def test_a_file_from_before_splits_is_brought_up_to_date(file, monkeypatch):
    monkeypatch.setattr("deltaserve.delta_store.registry.sqlite.MIGRATIONS", MIGRATIONS[:1])
    SqliteRegistry(file).close()
    with sqlite3.connect(file) as connection:
        connection.execute("INSERT INTO versions VALUES ('v', 1, 0, ?, ?)", (receipt(1).digest, receipt(1).to_json()))
        connection.execute("INSERT INTO variants VALUES ('v', 1)")
    monkeypatch.undo()
    registry = SqliteRegistry(file)
    assert registry.pointer("v").current.receipt == receipt(1)
    assert registry.pointer("v").canary is None
    registry.close()
