"""What every registry must do, the same tests for SQLite and for a real Redis."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
from redis_servers import redis_server

from deltaserve.delta_store.errors import (
    InvalidName,
    OptionError,
    RegistryUnavailable,
    VariantNotFound,
    VersionNotFound,
)
from deltaserve.delta_store.registry import Pointer, Receipt, check_name
from deltaserve.delta_store.registry.open import open_registry


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture(params=["sqlite", "redis"])
def address(request, tmp_path):
    """What ``open_registry`` takes, for a registry that is empty."""
    if request.param == "sqlite":
        return ("sqlite", tmp_path / "registry.sqlite3", "unused")
    return (request.getfixturevalue("redis_url"), tmp_path, uuid4().hex)


@pytest.fixture
def registry(address):
    registry = open_registry(*address)
    yield registry
    registry.close()


def receipt(number: int) -> Receipt:
    return Receipt(f"{number:064x}", 1000 + number, "b" * 64, None, 3, 3, {"kl": 0.5, "empty": [], "none": {}})


def test_what_was_registered_comes_back(registry):
    registered = registry.register("team/reviews", receipt(1))
    assert registered.number == 1
    assert registered.receipt == receipt(1)
    assert registry.current("team/reviews") == registered
    assert registry.pointer("team/reviews") == Pointer(registered)
    assert registry.variants() == [registered]
    registry.check()


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


def test_more_than_nine_versions_stay_in_order(registry):
    for number in range(12):
        registry.register("v", receipt(number))
    assert [version.number for version in registry.versions("v")] == list(range(12, 0, -1))


def test_variants_are_listed_by_name(registry):
    for name in ("b", "a/c", "a"):
        registry.register(name, receipt(1))
    assert [one.variant for one in registry.variants()] == ["a", "a/c", "b"]


def test_variants_may_share_bytes(registry):
    registry.register("one", receipt(1))
    registry.register("two", receipt(1))
    registry.remove("one")
    assert registry.digests() == {receipt(1).digest}


def test_a_name_is_turned_to_any_of_its_versions(registry):
    first, second = (registry.register("v", receipt(number)) for number in (1, 2))
    assert registry.point("v", first.digest) == Pointer(first) == registry.pointer("v")
    assert registry.current("v") == first
    assert registry.versions("v") == [second, first]


def test_a_split_lasts_until_the_next_turn(registry):
    first, second = (registry.register("v", receipt(number)) for number in (1, 2))
    split = Pointer(first, second, 0.1)
    assert registry.point("v", first.digest, second.digest, 0.1) == split == registry.pointer("v")
    assert registry.current("v") == first
    assert registry.register("v", receipt(3)) == registry.current("v")
    assert registry.pointer("v").canary is None
    registry.point("v", first.digest, second.digest, 0.5)
    assert registry.point("v", second.digest) == Pointer(second) == registry.pointer("v")


@pytest.mark.parametrize("split", [(2, 0.0), (2, 1.0), (2, -0.5), (1, 0.5), (None, 0.5)])
def test_a_split_that_is_none_is_refused(registry, split):
    first, _ = (registry.register("v", receipt(number)) for number in (1, 2))
    canary, share = split
    with pytest.raises(OptionError, match="share"):
        registry.point("v", first.digest, canary and receipt(canary).digest, share)
    assert registry.pointer("v").canary is None


def test_what_is_not_there_is_named(registry):
    first = registry.register("v", receipt(1))
    with pytest.raises(VersionNotFound, match=receipt(9).digest):
        registry.point("v", receipt(9).digest)
    with pytest.raises(VersionNotFound, match=receipt(9).digest):
        registry.point("v", first.digest, receipt(9).digest, 0.5)
    for ask in (registry.current, registry.pointer, registry.versions, registry.remove):
        with pytest.raises(VariantNotFound, match="'w'"):
            ask("w")
    with pytest.raises(VariantNotFound, match="'w'"):
        registry.point("w", first.digest)
    assert registry.pointer("v") == Pointer(first)


def test_a_removed_name_is_gone_and_can_be_used_again(registry):
    for number in (1, 2):
        registry.register("v", receipt(number))
    registry.remove("v")
    assert registry.variants() == []
    assert registry.digests() == set()
    with pytest.raises(VariantNotFound):
        registry.current("v")
    assert registry.register("v", receipt(3)).number == 1


def test_it_survives_a_restart(registry, address):
    first, second = (registry.register("v", receipt(number)) for number in (1, 2))
    registry.point("v", first.digest, second.digest, 0.25)
    registry.close()
    reopened = open_registry(*address)
    assert reopened.pointer("v") == Pointer(first, second, 0.25)
    reopened.close()


def test_a_closed_registry_does_not_answer(registry):
    registry.close()
    with pytest.raises(RegistryUnavailable):
        registry.check()


def test_c_register_race_two_processes(registry, address):
    """Two processes create, register and remove at once: no error, and every version is counted once."""
    script = (
        "import sys; from pathlib import Path\n"
        "from deltaserve.delta_store.registry import Receipt\n"
        "from deltaserve.delta_store.registry.open import open_registry\n"
        "registry = open_registry(sys.argv[1], Path(sys.argv[2]), sys.argv[3]); start = int(sys.argv[4])\n"
        "for i in range(start, start + 20):\n"
        "    registry.register('v', Receipt(f'{i:064x}', i, 'b' * 64, None, 1, 1))\n"
        "    registry.register(f'own-{start}', Receipt(f'{i:064x}', i, 'b' * 64, None, 1, 1))\n"
        "    registry.remove(f'own-{start}')\n"
        "registry.close()\n"
    )
    command = [sys.executable, "-c", script, *map(str, address)]
    processes = [subprocess.Popen([*command, str(start)], stderr=subprocess.PIPE) for start in (0, 1000)]
    errors = [process.communicate()[1].decode() for process in processes]
    assert errors == ["", ""]
    assert [version.number for version in registry.versions("v")] == list(range(40, 0, -1))
    assert len({version.digest for version in registry.versions("v")}) == 40
    assert registry.digests() == {version.digest for version in registry.versions("v")}


def test_c_register_race_threads_and_a_reader(registry):
    """A reader sees a name with a whole version or not at all."""
    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(registry.register, f"v{number}", receipt(number)) for number in range(40)]
        while not all(writer.done() for writer in writers):
            for seen in registry.variants():
                assert registry.current(seen.variant).receipt == seen.receipt
    assert [writer.result().number for writer in writers] == [1] * 40
    assert len(registry.variants()) == 40


@pytest.mark.parametrize("name", ["a", "A.b_c-d", "org/model", "0/1/2", "x" * 128])
def test_names_that_a_variant_can_have(name):
    assert check_name(name) == name


BAD = ["", " ", "/a", "a/", "a//b", "..", "a/../b", ".a", "-a", "a b", "a:b", "ä", "a\n", "a\0", "x" * 129]


def test_names_that_no_variant_can_have(registry):
    for name in BAD:
        with pytest.raises(InvalidName, match="variant's name"):
            registry.register(name, receipt(1))
    assert registry.variants() == []


def test_a_key_keeps_its_version_while_the_canary_grows(registry):
    first, second = (registry.register("v", receipt(number)) for number in (1, 2))
    keys = [f"user-{number}" for number in range(2000)]
    before: set[str] = set()
    for share in (0.1, 0.5, 0.9):
        pointer = Pointer(first, second, share)
        chosen = {key for key in keys if pointer.choose(key) == second}
        assert chosen == {key for key in keys if pointer.choose(key) == second}
        assert before < chosen
        assert abs(len(chosen) / len(keys) - share) < 0.05
        before = chosen
    assert {pointer.choose(None).number for _ in range(1000)} == {1, 2}
    assert Pointer(first).choose("user-1") == first
