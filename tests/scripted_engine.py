"""An engine that says what it is told to: forced tokens, delays, failures, limits. Same interface as the real one."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tiny_models import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from deltaserve.delta_store.errors import ContextTooLong, GenerationFailed, QueueFull
from deltaserve.server.engine.reports import EngineState, Reports
from deltaserve.server.engine.requests import Finished, FinishReason, Sampling, Token, Turn, Version
from deltaserve.server.engine.stream import Event, Stream, post

WORDS = ("MN", "OPQ", "RS", "T", "U V", "WX")
VOCABULARY = 300


@dataclass(frozen=True)
class Script:
    """What one request is answered with. ``fail_after`` so many tokens it fails; ``endless`` repeats the tokens.

    The first token comes when ``begins`` is true.
    """

    tokens: Sequence[int | Token] = ()
    every_s: float = 0.0
    fail_after: int | None = None
    failure: Exception = field(default_factory=lambda: GenerationFailed("The model step failed: out of memory"))
    endless: bool = False
    begins: Callable[[], bool] = lambda: True


@dataclass
class Submitted:
    prompt: list[int]
    version: Version | None
    sampling: Sampling
    produced: int = 0
    reason: FinishReason | None = None


class NothingPinned:
    """What the routes ask of a bank."""

    pinned: frozenset[str] = frozenset()

    def unpin(self, name: str) -> None: ...


class ScriptedEngine:
    """``script(prompt, version, sampling)`` answers a request; ``submitted`` is what arrived, and what became of it."""

    def __init__(self, context_length: int = 64, max_running: int = 32, max_waiting: int = 256) -> None:
        self.tokenizer = scripted_tokenizer()
        self.vocab_size = VOCABULARY
        self.context_length = context_length
        self.fingerprint = "f" * 64
        self.failure: str | None = None
        self.ended: str | None = None
        self.script: Callable[[Sequence[int], Version | None, Sampling], Script] = lambda *_: Script()
        self.submitted: list[Submitted] = []
        self.refusal: Exception | None = None
        self.rejected = 0
        self._places = max_running + max_waiting
        self._turns = asyncio.Semaphore(max_running)
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = False
        self.bank = NothingPinned()

    @property
    def live(self) -> int:
        """Requests that run or wait."""
        return len(self._tasks)

    def start(self) -> None:
        self._running = True

    def stop(self) -> None:
        self._running = False

    def ready(self) -> bool:
        return self._running and self.failure is None

    def watch(self, reports: Reports) -> None:
        """What happens here is in ``submitted``."""

    def state(self) -> EngineState:
        return EngineState(running=self.live)

    def forget(self, digest: str) -> None:
        """There is nothing to let go of: no variant's weights are here."""

    def tier(self, digest: str) -> str:
        return "store"

    async def submit(
        self, prompt_ids: Sequence[int], version: Version | None, sampling: Sampling, turn: Turn | None = None
    ) -> Stream:
        if self.refusal:
            raise self.refusal
        if len(prompt_ids) + sampling.max_tokens > self.context_length:
            raise ContextTooLong("The HTTP layer let too long a request through")
        if self.live >= self._places:
            self.rejected += 1
            raise QueueFull(f"{self._places} requests run or wait; try again later")
        record = Submitted(list(prompt_ids), version, sampling)
        self.submitted.append(record)
        cancelled = asyncio.Event()
        stream = Stream(asyncio.get_running_loop(), cancelled.set)
        task = asyncio.create_task(self._answer(record, stream, cancelled))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    async def _answer(self, record: Submitted, stream: Stream, cancelled: asyncio.Event) -> None:
        script = self.script(record.prompt, record.version, record.sampling)
        turn, leaving = asyncio.create_task(self._turns.acquire()), asyncio.create_task(cancelled.wait())
        await asyncio.wait({turn, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not turn.done():
            turn.cancel()
            post([(stream, self._finished(record, "cancelled"))])
            return
        last = await self._say(script, record, stream, cancelled)
        self._turns.release()
        post([(stream, last)])

    async def _say(self, script: Script, record: Submitted, stream: Stream, cancelled: asyncio.Event) -> Event:
        tokens = list(script.tokens)
        while not script.begins() and not cancelled.is_set():
            await asyncio.sleep(0.05)
        while True:
            for token in tokens:
                if cancelled.is_set():
                    return self._finished(record, "cancelled")
                if record.produced == script.fail_after:
                    return script.failure
                if record.produced == record.sampling.max_tokens:
                    return self._finished(record, "length")
                await asyncio.sleep(script.every_s)
                record.produced += 1
                post(
                    [(stream, token if isinstance(token, Token) else Token(token, *_logprobs(record.sampling, token)))]
                )
            if not script.endless:
                break
        if record.produced == script.fail_after:
            return script.failure
        return self._finished(record, "length" if record.produced == record.sampling.max_tokens else "stop")

    def _finished(self, record: Submitted, reason: FinishReason) -> Finished:
        record.reason = reason
        return Finished(reason, len(record.prompt), record.produced)


def _logprobs(sampling: Sampling, token: int) -> tuple[Any, ...]:
    if sampling.logprobs is None:
        return ()
    return -0.5, ((token, -0.5), (token - 1, -1.5), (0, float("-inf")))[: sampling.logprobs]


def scripted_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, one token a byte, with WORDS as tokens of their own."""
    tokenizer = tiny_tokenizer(258)
    tokenizer.add_tokens(list(WORDS))
    return tokenizer


def ids(tokenizer: PreTrainedTokenizerFast, text: str | bytes) -> list[int]:
    """One token for each byte of ``text``."""
    data = text.encode() if isinstance(text, str) else text
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[_BYTE_NAMES[byte]] for byte in data]


def words(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens of ``MNOPQRSTU VWX``."""
    return [tokenizer.convert_tokens_to_ids(word) for word in WORDS]


def _byte_names() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


_BYTE_NAMES = _byte_names()
