"""The SQLite registry: versions are immutable, names flip in one step, processes share a file."""

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from deltaserve.delta_store.errors import InvalidName, RegistryUnavailable, VariantNotFound
from deltaserve.delta_store.registry import Receipt, check_name
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


def test_what_was_registered_comes_back(registry):
    registered = registry.register("team/reviews", receipt(1))
    assert registered.number == 1
    assert registered.receipt == receipt(1)
    assert registry.current("team/reviews") == registered
    assert registry.variants() == [registered]


def test_a_new_upload_is_a_new_version_and_the_name_points_at_it(registry):
    first, second = (registry.register("v", receipt(number)) for number in (1, 2))
    assert (first.number, second.number) == (1, 2)
    assert registry.current("v") == second
    assert registry.versions("v") == [second, first]


def test_bytes_that_the_variant_had_turn_the_name_back(registry):
    first = registry.register("v", receipt(1))
    registry.register("v", receipt(2))
    assert registry.register("v", receipt(1)) == first == registry.current("v")
    assert len(registry.versions("v")) == 2


def test_variants_may_share_bytes(registry):
    registry.register("one", receipt(1))
    registry.register("two", receipt(1))
    registry.remove("one")
    assert registry.digests() == {receipt(1).digest}


def test_a_removed_name_is_gone_and_can_be_used_again(registry):
    registry.register("v", receipt(1))
    registry.register("v", receipt(2))
    registry.remove("v")
    assert registry.variants() == []
    assert registry.digests() == set()
    for ask in (registry.current, registry.versions, registry.remove):
        with pytest.raises(VariantNotFound, match="'v'"):
            ask("v")
    assert registry.register("v", receipt(3)).number == 1


def test_it_survives_a_restart(registry, file):
    registered = registry.register("v", receipt(1))
    registry.close()
    reopened = SqliteRegistry(file)
    assert reopened.current("v") == registered
    reopened.close()


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


def test_a_closed_registry_does_not_answer(registry):
    registry.close()
    with pytest.raises(RegistryUnavailable):
        registry.variants()


def test_c_register_race_two_processes_on_one_file(registry, file):
    """Two processes create, register and remove at once: no 'locked' error, and every version is counted once."""
    script = (
        "import sys; from pathlib import Path\n"
        "from deltaserve.delta_store.registry import Receipt\n"
        "from deltaserve.delta_store.registry.sqlite import SqliteRegistry\n"
        "registry = SqliteRegistry(Path(sys.argv[1])); start = int(sys.argv[2])\n"
        "for i in range(start, start + 50):\n"
        "    registry.register('v', Receipt(f'{i:064x}', i, 'b' * 64, None, 1, 1))\n"
        "    registry.register(f'own-{start}', Receipt(f'{i:064x}', i, 'b' * 64, None, 1, 1))\n"
        "    registry.remove(f'own-{start}')\n"
    )
    command = [sys.executable, "-c", script, str(file)]
    processes = [subprocess.Popen([*command, str(start)], stderr=subprocess.PIPE) for start in (0, 1000)]
    errors = [process.communicate()[1].decode() for process in processes]
    assert errors == ["", ""]
    assert [version.number for version in registry.versions("v")] == list(range(100, 0, -1))
    assert len({version.digest for version in registry.versions("v")}) == 100
    assert [one.variant for one in registry.variants()] == ["v"]


def test_c_register_race_threads_and_a_reader(registry):
    """A reader sees a name with a whole version or not at all."""
    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(registry.register, f"v{number}", receipt(number)) for number in range(40)]
        while not all(writer.done() for writer in writers):
            for seen in registry.variants():
                assert registry.current(seen.variant).receipt == seen.receipt
    assert len(registry.variants()) == 40


@pytest.mark.parametrize("name", ["a", "A.b_c-d", "org/model", "0/1/2", "x" * 128])
def test_names_that_a_variant_can_have(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", " ", "/a", "a/", "a//b", "..", "a/../b", ".a", "-a", "a b", "a:b", "ä", "a\n", "a\0", "x" * 129]
)
def test_names_that_no_variant_can_have(registry, name):
    with pytest.raises(InvalidName, match="variant's name"):
        registry.register(name, receipt(1))
    assert registry.variants() == []
