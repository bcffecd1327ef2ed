"""What goes into the engine and what comes out: free of HTTP and of the batching library."""

from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

from deltaserve.server.engine.grammar import Grammar

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request's tokens are chosen. The HTTP layer has checked every range before it builds one.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 keep everything. ``seed`` None draws a fresh one.
    ``logprobs`` None returns none, n >= 0 returns the chosen token's and the n most likely ones', of the model's own
    distribution (before temperature and filters). ``grammar`` is what the answer must follow; where it ends, so does
    the answer.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    grammar: Grammar | None = None


@dataclass(slots=True)
class Turn:
    """What the requests that are answered together wait for: ``began`` once one of them was in a step.

    ``arrived`` is on ``perf_counter``.
    """

    arrived: float = field(default_factory=perf_counter)
    began: bool = False

    def is_late(self, limit_s: float | None) -> bool:
        """Whether it has waited for longer than it may."""
        return limit_s is not None and not self.began and perf_counter() - self.arrived > limit_s


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable artifact of a variant: ``path`` is the artifact on this machine, ``digest`` its SHA-256 in hex."""

    variant: str
    digest: str
    path: str


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. ``logprob`` (nats, at most 0) and ``top`` [(token id, logprob)] are there if asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request that was not failed. An end-of-sequence token is not delivered as a ``Token``.

    ``queued_s`` and ``ran_s``: how long it waited for its first step, and from that to its end; None if it had none.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queued_s: float | None = None
    ran_s: float | None = None
