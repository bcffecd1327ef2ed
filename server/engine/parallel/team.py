"""Process 0's side: starts the others, tells them what to do, and notices when one is gone."""

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig

from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.errors import ArtifactError, EngineDown, OptionError
from deltaserve.server.engine.base_model import Base, load_base
from deltaserve.server.engine.device import choose
from deltaserve.server.engine.limits import EngineLimits
from deltaserve.server.engine.parallel import group
from deltaserve.server.engine.parallel.messages import (
    Begin,
    Clear,
    Failed,
    Install,
    Load,
    Loaded,
    Meet,
    Ready,
    Step,
    packed,
)
from deltaserve.server.engine.parallel.sharding import Sharding
from deltaserve.server.engine.requests import Version
from deltaserve.server.engine.routing import Routing
from deltaserve.server.engine.wrapped import Fitted, WrappedModel

logger = logging.getLogger(__name__)

END_SECONDS = 5.0
"""A process whose pipe is closed ends by itself within moments; one that does not is killed."""
MOMENT_SECONDS = 2.0
NOT_CARRIED = ("cache", "paged", "logits_to_keep", "logits_processor_args")


class Team:
    """The processes 1 to ``limits.tensor_parallel`` - 1. Whatever goes wrong with one is the end of all.

    ``lost`` says what went wrong, None while nothing has; ``on_lost`` is called with it, once, on a thread of its own.
    ``in_step``: whether a step was begun and not finished, so that nothing else can be computed.
    """

    def __init__(self, checkpoint: Checkpoint, fingerprint: str, limits: EngineLimits) -> None:
        self._checkpoint, self._limits, self.size = checkpoint, limits, limits.tensor_parallel
        config = AutoConfig.from_pretrained(checkpoint.folder).get_text_config()
        self._sharding = Sharding.of(config, self.size)
        self.lost: str | None = None
        self.on_lost: Callable[[str], None] = lambda reason: None
        self.in_step = False
        self._closing = False
        self._folder = tempfile.TemporaryDirectory(prefix="deltaserve-")
        self._meeting = Path(self._folder.name) / "meeting"
        self._sending, self._changed = threading.Lock(), threading.Condition()
        self._answers: dict[int, Ready | Loaded] = {}
        self._members: dict[int, tuple[subprocess.Popen[bytes], Connection]] = {}
        for rank in range(1, self.size):
            process, connection = self._members[rank] = _started(rank)
            name = f"process {rank}"
            threading.Thread(target=self._listen, args=(rank, process, connection), name=name, daemon=True).start()
            with suppress(OSError):  # it is gone already, which is heard of
                connection.send(Begin(checkpoint.folder, fingerprint, limits, rank))

    def load_base(self) -> Base:
        """This process's share, once all have theirs; from now on the others compute each step that its model does.

        Raises as the function of that name, and EngineDown.
        """
        try:
            base = load_base(self._checkpoint, self._limits, LedRouting, self._sharding, self._meet)
        except BaseException:
            self.close()
            raise
        self._lead(base.model, cast(LedRouting, base.routing))
        return base

    def _meet(self, device: torch.device) -> None:
        self._await_answers()
        self.send(Meet(self._meeting))
        group.join(0, self.size, self._meeting, device)

    def send(self, message: Any) -> None:
        """Tell all others; whether they are still there is for whoever needs them to see."""
        try:
            with self._sending:
                for _, connection in self._members.values():
                    connection.send(message)
        except OSError as error:
            self.end(f"One of {self.size} processes is gone: {error}")

    def load(self, version: Version, profile: Path | None, own: Callable[[], Fitted]) -> Fitted:
        """Have everybody load a version, while ``own`` loads this process's share. One at a time.

        Raises what ``own`` does, ArtifactError where only others fail, EngineDown.
        """
        with self._changed:
            self._answers.clear()
        self.send(Load(version, profile))
        try:
            fitted = own()
        finally:
            answers = self._await_answers(group.PATIENCE.total_seconds())
        errors = [one.error for one in answers if isinstance(one, Loaded) and one.error is not None]
        if errors:
            raise ArtifactError(f"Variant {version.variant!r} cannot be loaded by every process: {errors[0]}")
        return fitted

    def _lead(self, model: nn.Module, routing: "LedRouting") -> None:
        def begin(_: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
            carried = {name: value for name, value in inputs.items() if name not in NOT_CARRIED}
            paged = inputs.get("paged")
            self.in_step = True
            self.send(Step(routing.assigned, packed(carried), None if paged is None else packed(paged.requests)))
            if self.lost is not None:
                raise EngineDown(self.lost)

        def over(*_: Any) -> None:
            self.in_step = False

        model.register_forward_pre_hook(begin, with_kwargs=True)
        model.register_forward_hook(over)

    def end(self, reason: str) -> str:
        """Nothing can be computed any more, for this reason or one that is known already; returns which."""
        with self._changed:
            if self._closing or self.lost is not None:
                return self.lost or reason
            self.lost = reason
            self._changed.notify_all()
        logger.critical("%s; the server ends, since all processes are needed", reason)
        for process, _ in self._members.values():
            process.kill()
        threading.Thread(target=self.on_lost, args=(reason,), daemon=True).start()
        return reason

    def verdict(self, error: Exception) -> str | None:
        """After an error in this process: why nothing can be computed any more, None where it was not in a step.

        What failed here may be a process that is gone: that is heard of within moments.
        """
        if not self.in_step:
            return self.lost
        with self._changed:
            self._changed.wait_for(lambda: self.lost is not None, MOMENT_SECONDS)
        return self.end(f"A step failed on process 0 of {self.size}: {error}")

    def close(self) -> None:
        """End the others, and leave the group."""
        with self._changed:
            self._closing = True
        for process, connection in self._members.values():
            with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as pipe:
                pipe.shutdown(socket.SHUT_RDWR)  # closing it would not wake the thread that reads
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        group.leave()
        self._folder.cleanup()

    def _await_answers(self, seconds: float | None = None) -> list[Ready | Loaded]:
        with self._changed:
            self._changed.wait_for(lambda: self.lost is not None or len(self._answers) == len(self._members), seconds)
            answers = list(self._answers.values())
        if self.lost is None and len(answers) < len(self._members):
            self.end(f"One of {self.size} processes has not answered for {seconds:.0f} s")
        if self.lost is not None:
            raise EngineDown(self.lost)
        return answers

    def _listen(self, rank: int, process: "subprocess.Popen[bytes]", connection: Connection) -> None:
        why = ""
        try:
            while True:
                answer = connection.recv()
                if isinstance(answer, Failed):
                    why = f": {answer.error}"
                    continue
                with self._changed:
                    self._answers[rank] = answer
                    self._changed.notify_all()
        except (EOFError, OSError):
            if not self._closing:
                self.end(f"Process {rank} of {self.size} {_how_it_ended(process)}{why}")


class LedRouting(Routing):
    """Remembers what it was told last."""

    __slots__ = ("assigned",)
    assigned: tuple[tuple[Any, ...], dict[str, Any]]

    def assign(self, *args: Any, **options: Any) -> None:
        self.assigned = args, options
        super().assign(*args, **options)


class LedModel:
    """What the bank does to the model, it does to everybody's."""

    def __init__(self, team: Team, model: WrappedModel) -> None:
        self._team, self._model = team, model

    def install(self, slot: int, fitted: Fitted) -> None:
        self._team.send(Install(slot))
        self._model.install(slot, fitted)

    def clear(self, slot: int) -> None:
        self._team.send(Clear(slot))
        self._model.clear(slot)


def checked(limits: EngineLimits) -> EngineLimits:
    """The limits of each process: alone, as they are. Raises OptionError for what several processes cannot do."""
    if (n := limits.tensor_parallel) == 1:
        return limits
    if limits.policy == "swap":
        raise OptionError(f"Policy 'swap' is not supported with tensor_parallel {n}; use auto or mixed")
    if limits.weights != "plain":
        raise OptionError(f"Weights {limits.weights!r} are not supported with tensor_parallel {n}; use plain")
    if choose(limits.device, limits.backend)[0].type == "cuda" and (there := torch.cuda.device_count()) < n:
        raise OptionError(f"tensor_parallel is {n}, but there are {there} GPUs; lower it")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return limits if limits.threads is not None else replace(limits, threads=max(1, cores // n))


def _started(rank: int) -> "tuple[subprocess.Popen[bytes], Connection]":
    """A process, which sees its own GPU if there are any; it ends when its pipe is closed: also if we are killed."""
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    own = {"CUDA_VISIBLE_DEVICES": gpus[rank]} if rank < len(gpus) else {}
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        command = [sys.executable, "-m", "deltaserve.server.engine.parallel.worker", str(fd)]
        process = subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.DEVNULL, stdout=2, env=os.environ | own)
    return process, Connection(ours.detach())


def _how_it_ended(process: "subprocess.Popen[bytes]") -> str:
    try:
        status = process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        return "does not answer"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
