"""Real Redis servers on free ports, and sockets that only look like one."""

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from running_server import wait_until


@dataclass(frozen=True)
class RedisServer:
    url: str
    process: subprocess.Popen


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextmanager
def redis_server(folder: Path, port: int | None = None) -> Iterator[RedisServer]:
    """A server that keeps nothing on disk. Skips the test where Redis is not installed."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    port = port or free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            with redis.Redis(port=port, socket_timeout=1) as client:
                wait_until(lambda: _answers(client), 10)
            yield RedisServer(f"redis://127.0.0.1:{port}/0", process)
        finally:
            process.kill()


def _answers(client: redis.Redis) -> bool:
    with suppress(redis.RedisError):
        return client.ping()
    return False


@contextmanager
def silent_server(closes: bool) -> Iterator[str]:
    """The address of a server that accepts connections and never answers, or closes each at once."""
    held = []

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                if closes:
                    connection.close()
                else:
                    held.append(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    for connection in held:
        connection.close()
