"""What is the Redis registry's own: replicas that follow each other, and a Redis that goes away (C-silent-registry)."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from redis_servers import free_port, redis_server, silent_server
from running_server import wait_until

from deltaserve.delta_store.errors import OptionError, RegistryUnavailable, VariantNotFound
from deltaserve.delta_store.registry import Receipt
from deltaserve.delta_store.registry.open import open_registry
from deltaserve.delta_store.registry.redis import RedisRegistry


@pytest.fixture
def server(tmp_path):
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
def registry(server):
    with closing(RedisRegistry(server.url)) as registry:
        yield registry


def receipt(number: int) -> Receipt:
    return Receipt(f"{number:064x}", 1000, "b" * 64, None, 1, 1)


def test_another_replica_follows_within_a_second(server, registry):
    with closing(RedisRegistry(server.url)) as other:
        first = registry.register("v", receipt(1))
        assert other.current("v") == first
        second = registry.register("v", receipt(2))
        wait_until(lambda: other.current("v") == second, 1)
        registry.point("v", first.digest)
        wait_until(lambda: other.current("v") == first, 1)
        registry.remove("v")
        wait_until(lambda: other.variants() == [], 1)


def test_an_announcement_that_is_missed_is_found_by_polling(server, registry, monkeypatch):
    monkeypatch.setattr("deltaserve.delta_store.registry.redis_scripts.REGISTER", quiet_register())
    with closing(RedisRegistry(server.url)) as other:
        other.register("v", receipt(1))
        assert registry.current("v").receipt == receipt(1)
        other.register("v", receipt(2))
        wait_until(lambda: registry.current("v").receipt == receipt(2), 2)


def quiet_register() -> str:
    from deltaserve.delta_store.registry.redis_scripts import REGISTER

    assert "PUBLISH" in REGISTER
    return REGISTER.replace("redis.call('PUBLISH', prefix .. ':changed', name)", "")


def test_prefixes_keep_two_clusters_apart(server, registry):
    with closing(RedisRegistry(server.url, "other")) as other:
        registry.register("v", receipt(1))
        with pytest.raises(VariantNotFound):
            other.current("v")
        assert other.digests() == set()


def test_a_redis_that_was_emptied_is_followed_too(tmp_path):
    port = free_port()
    with redis_server(tmp_path, port) as server:
        registry = RedisRegistry(server.url)
        for number in range(5):
            registry.register("old", receipt(number))
    with closing(registry), redis_server(tmp_path, port):
        wait_until(lambda: registry.variants() == [], 5)
        registry.register("new", receipt(1))
        assert [one.variant for one in registry.variants()] == ["new"]


@pytest.mark.parametrize("closes", [False, True])
def test_c_silent_registry_at_start_it_says_so_in_time(closes):
    with silent_server(closes) as url:
        begun = time.monotonic()
        with pytest.raises(RegistryUnavailable, match=r"registry redis://127\.0\.0\.1:\d+/0 does not answer"):
            RedisRegistry(url)
        assert time.monotonic() - begun < 5


def test_c_silent_registry_absent_at_start():
    with pytest.raises(RegistryUnavailable, match="refused"):
        RedisRegistry(f"redis://:secret@127.0.0.1:{free_port()}/0")


def test_c_silent_registry_paused_known_names_answer_new_ones_fail_in_time_and_it_recovers(server, registry):
    known = registry.register("v", receipt(1))
    server.process.send_signal(signal.SIGSTOP)
    try:
        begun = time.monotonic()
        with pytest.raises(RegistryUnavailable, match="variants that were served before still are"):
            registry.check()
        assert time.monotonic() - begun < 5
        begun = time.monotonic()
        assert registry.current("v") == known
        assert registry.variants() == [known]
        assert time.monotonic() - begun < 0.1
        with ThreadPoolExecutor(20) as pool:
            begun = time.monotonic()
            asked = [pool.submit(registry.current, f"new-{number}") for number in range(60)]
            assert all(isinstance(one.exception(), RegistryUnavailable) for one in asked)
            assert time.monotonic() - begun < 5
    finally:
        server.process.send_signal(signal.SIGCONT)
    wait_until(lambda: answers(registry), 1)
    assert registry.register("v", receipt(2)).number == 2


def test_c_silent_registry_it_dies_and_comes_back(tmp_path):
    port = free_port()
    with redis_server(tmp_path, port) as server:
        registry = RedisRegistry(server.url)
        known = registry.register("v", receipt(1))
        server.process.kill()
        server.process.wait()
        with pytest.raises(RegistryUnavailable):
            registry.register("w", receipt(1))
        assert registry.current("v") == known
    with closing(registry), redis_server(tmp_path, port):
        assert registry.register("w", receipt(1)).number == 1


def answers(registry: RedisRegistry) -> bool:
    try:
        registry.check()
    except RegistryUnavailable:
        return False
    return True


def test_a_password_is_never_told():
    with pytest.raises(RegistryUnavailable) as raised:
        RedisRegistry(f"redis://user:secret@127.0.0.1:{free_port()}/0?socket_timeout=1")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("address", ["", "sqllite", "http://localhost", "localhost:6379"])
def test_an_address_of_no_registry_is_refused(tmp_path, address):
    with pytest.raises(OptionError, match="use sqlite, or redis://"):
        open_registry(address, tmp_path, "p")


def test_a_malformed_address_is_refused_by_name(tmp_path):
    with pytest.raises(OptionError, match="redis://localhost:port/0"):
        open_registry("redis://localhost:port/0", tmp_path, "p")
