"""One of the other processes: loads its share of the base and of variants, and computes every step along."""

import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.generation.continuous_batching.distributed import DistributedHelper

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.errors import DeltaServeError
from deltaserve.server.engine import attention
from deltaserve.server.engine.base_model import load_base
from deltaserve.server.engine.continuous_batching.cache import SaltedCache
from deltaserve.server.engine.loading import ArtifactLoader
from deltaserve.server.engine.paging import Paged, reader
from deltaserve.server.engine.parallel import group
from deltaserve.server.engine.parallel.messages import (
    Begin,
    Clear,
    Failed,
    Install,
    Load,
    Loaded,
    Meet,
    Message,
    NewCache,
    Ready,
    Step,
    unpacked,
)
from deltaserve.server.engine.parallel.sharding import Sharding
from deltaserve.server.engine.wrapped import Fitted


class Worker:
    """``begin`` is what process 0 said first; ``meet`` waits until it says where the group meets."""

    def __init__(self, connection: Connection, begin: Begin, meet: Callable[[], Meet]) -> None:
        limits, rank = begin.limits, begin.rank
        if limits.threads is not None:
            torch.set_num_threads(limits.threads)
        self._connection, self._answering = connection, threading.Lock()
        checkpoint = open_checkpoint(begin.folder)
        config = AutoConfig.from_pretrained(checkpoint.folder).get_text_config()
        sharding = Sharding.of(config, limits.tensor_parallel, rank)

        def join(device: torch.device) -> None:
            self.answer(Ready())
            group.join(rank, limits.tensor_parallel, meet().meeting, device)

        base = load_base(checkpoint, limits, sharding=sharding, meet=join)
        self._model, self._wrapped, self._routing = base.model, base.wrapped, base.routing
        self._model.set_attn_implementation(base.flash_attention or attention.NAME)
        self._profile: Path | None = None
        self._artifacts = ArtifactLoader(checkpoint, begin.fingerprint, self._profile_path, limits.host_bytes)
        self._artifacts.is_disturbing = lambda: True
        self._reader = reader(self._wrapped.backend, self._model.device, self._model.dtype)
        self._cache: SaltedCache | None = None
        self._loaded: Fitted | None = None
        self._loads = ThreadPoolExecutor(1, thread_name_prefix="bank")

    def answer(self, answer: Ready | Loaded | Failed) -> None:
        with self._answering:
            self._connection.send(answer)

    @torch.inference_mode()
    def take(self, message: Message) -> None:
        """Do what process 0 says. Loads go on beside steps."""
        match message:
            case Step():
                self._step(message)
            case Load():
                self._loads.submit(self._load, message)
            case Install():
                assert self._loaded is not None
                self._wrapped.install(message.slot, self._loaded)
                self._loaded = None
            case Clear():
                self._wrapped.clear(message.slot)
            case NewCache():
                self._cache = SaltedCache.of(self._model, message.config, DistributedHelper(None, None))
                self._cache.reader = self._reader

    def _step(self, step: Step) -> None:
        assert self._cache is not None
        device = self._model.device
        inputs = unpacked(step.inputs, device)
        if step.requests is not None:
            assert self._reader is not None
            inputs["paged"] = Paged(self._reader, self._cache.stored, *unpacked(step.requests, torch.device("cpu")))
        arguments, options = step.rows
        self._routing.assign(*arguments, **options)
        self._model.base_model(**inputs, cache=self._cache)

    def _load(self, message: Load) -> None:
        try:
            self._loaded, self._profile = None, message.profile
            self._loaded = self._wrapped.fit(self._artifacts(message.version))
            self.answer(Loaded())
        except Exception as error:  # one version's artifact; process 0 says so to whoever asked
            self.answer(Loaded(str(error) or repr(error)))

    def _profile_path(self, digest: str) -> Path:
        assert self._profile is not None
        return self._profile


def run(connection: Connection) -> None:
    """Until the pipe is closed, or something fails that is not one version's."""
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, messages), daemon=True).start()
    worker = Worker(connection, messages.get(), messages.get)
    while True:
        worker.take(messages.get())


def _receive(connection: Connection, messages: "queue.SimpleQueue[Any]") -> None:
    """Everything that comes; when process 0 is gone, so is this one, whatever it waits for."""
    try:
        while True:
            messages.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def main() -> None:
    """``python -m deltaserve.server.engine.parallel.worker FD``, as team.py starts it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for all: process 0 still finishes what runs
    connection = Connection(int(sys.argv[1]))
    try:
        run(connection)
    except Exception as error:
        if not isinstance(error, DeltaServeError):
            logging.exception("A process of the engine failed")
        connection.send(Failed(str(error) or repr(error)))
        os._exit(1)  # the group may wait for others, which are ended now


if __name__ == "__main__":
    main()
