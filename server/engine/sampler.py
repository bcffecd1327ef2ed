"""Each request chooses its tokens by its own settings, its own history and its own generator."""

import math
import secrets
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from deltaserve.delta_store.errors import GenerationFailed, RequestRefused
from deltaserve.server.engine.requests import Sampling, Token

NUCLEUS_GUESS = 1024
"""Top-p sorts this many of the likeliest tokens first, and the whole vocabulary only where they do not hold enough."""


class Chooser:
    """One request's choice of tokens. ``generated`` is what it has chosen so far; ``stop_ids`` end the request.

    A seed gives the same tokens whatever else is in the batch: a sampled token costs exactly one number of the
    request's own generator. Without a seed, one is drawn from the operating system.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], stop_ids: Collection[int]) -> None:
        self.sampling = sampling
        self.stop_ids = frozenset() if sampling.ignore_eos else frozenset(stop_ids)
        self.generated: list[int] = []
        self._prompt = frozenset(prompt) if sampling.repetition_penalty != 1 else frozenset()
        self._counts: Counter[int] = Counter()
        self._path = sampling.grammar.begin() if sampling.grammar is not None else None
        self._generator = torch.Generator()
        self._generator.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is the answer and nothing else is asked."""
        return (
            self._path is None
            and self.sampling.temperature == 0
            and self.sampling.logprobs is None
            and not self._adjusts
        )

    @property
    def ended(self) -> bool:
        """Whether its grammar leaves nothing to add."""
        return self._path is not None and self._path.ended

    @property
    def _adjusts(self) -> bool:
        s = self.sampling
        penalised = s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1
        return bool(penalised or s.logit_bias) or self._must_go_on

    @property
    def _must_go_on(self) -> bool:
        return len(self.generated) < self.sampling.min_tokens

    def choose(self, logits: Tensor) -> Token:
        """The next token, from float32 ``[vocabulary]``."""
        adjusted = self._adjust(logits) if self._adjusts else logits
        if self._path is not None:
            adjusted = self._path.allowed(adjusted, self.stop_ids)
        token = int(adjusted.argmax()) if self.sampling.temperature == 0 else self._draw(adjusted)
        if self._path is not None and token not in self.stop_ids:
            self._path.take(token)
        return _with_logprobs(token, logits, self.sampling.logprobs)

    def note(self, token: int) -> None:
        """``token`` was chosen."""
        self.generated.append(token)
        self._counts[token] += 1

    def _adjust(self, logits: Tensor) -> Tensor:
        """Penalties over the history, bias, and no end before ``min_tokens``."""
        s, logits = self.sampling, logits.clone()
        if s.repetition_penalty != 1 and (seen := self._prompt | self._counts.keys()):
            ids = _ids(seen, logits)
            values = logits[ids]
            logits[ids] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        if (s.presence_penalty or s.frequency_penalty) and self._counts:
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype, device=logits.device)
            logits[_ids(self._counts, logits)] -= s.presence_penalty + s.frequency_penalty * counts
        if s.logit_bias:
            bias = torch.tensor(list(s.logit_bias.values()), dtype=logits.dtype, device=logits.device)
            logits[_ids(s.logit_bias, logits)] += bias
        if self._must_go_on and self.stop_ids:
            logits[_ids(self.stop_ids, logits)] = -math.inf
        return logits

    def _draw(self, logits: Tensor) -> int:
        """Temperature, then top-k, top-p and min-p, then one draw by the inverse of the cumulated probabilities."""
        s = self.sampling
        probabilities = ((logits - logits.max()) / s.temperature).softmax(-1)
        ids: Tensor | None = None
        if 0 < s.top_k < len(probabilities):
            probabilities, ids = probabilities.topk(s.top_k)
            probabilities = probabilities / probabilities.sum()
        if s.top_p < 1:
            probabilities, ids = _nucleus(probabilities, ids, s.top_p)
        if s.min_p > 0:
            probabilities = probabilities.where(probabilities >= s.min_p * probabilities.max(), 0.0)
        cumulated = probabilities.double().cumsum(0)
        drawn = torch.rand((), dtype=torch.float64, generator=self._generator).to(cumulated.device) * cumulated[-1]
        at = int(torch.searchsorted(cumulated, drawn, right=True).clamp(max=len(cumulated) - 1))
        return at if ids is None else int(ids[at])


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[Token | Exception]:
    """A token for each row of float32 ``[rows, vocabulary]``, or the exception that this row alone fails with."""
    best, ids = logits.max(-1)
    rows = zip(choosers, best.tolist(), ids.tolist(), strict=True)
    return [_choose(chooser, logits[i], value, token) for i, (chooser, value, token) in enumerate(rows)]


def _choose(chooser: Chooser, logits: Tensor, best: float, token: int) -> Token | Exception:
    if not math.isfinite(best):  # the largest of a row with a NaN is NaN
        return GenerationFailed(
            "The model's logits for this request are not finite; try another variant or a shorter prompt"
        )
    try:
        chosen = Token(token) if chooser.is_plain else chooser.choose(logits.cpu())
    except Exception as error:  # whatever one request's settings break, its neighbours go on
        return error
    chooser.note(chosen.token_id)
    return chosen


def _ids(tokens: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64, device=like.device)


def _nucleus(probabilities: Tensor, ids: Tensor | None, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens that together reach ``top_p``, in descending order, with zeros after them."""
    ordered, order = probabilities.topk(min(NUCLEUS_GUESS, len(probabilities)))
    if ordered.sum() < top_p:
        ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(0) - ordered
    return ordered.where(before < top_p, 0.0), order if ids is None else ids[order]


def _with_logprobs(token: int, logits: Tensor, count: int | None) -> Token:
    if count is None:
        return Token(token)
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    top = tuple((i, value) for i, value in zip(ids.tolist(), values.tolist(), strict=True) if math.isfinite(value))
    return Token(token, min(float(logprobs[token]), 0.0), top)


def check(sampling: Sampling) -> None:
    """Raise RequestRefused, naming the field, for a number that must not reach the sampler."""
    s = sampling
    _within("max_tokens", s.max_tokens, 1, math.inf)
    _within("temperature", s.temperature, 0, 1e6)
    _within("top_p", s.top_p, 1e-9, 1)
    _within("top_k", s.top_k, 0, math.inf)
    _within("min_p", s.min_p, 0, 1)
    _within("presence_penalty", s.presence_penalty, -1e6, 1e6)
    _within("frequency_penalty", s.frequency_penalty, -1e6, 1e6)
    _within("repetition_penalty", s.repetition_penalty, 1e-6, 1e6)
    _within("seed", s.seed or 0, -(2**63), 2**64 - 1)
    _within("logprobs", s.logprobs or 0, 0, 1000)
    _within("min_tokens", s.min_tokens, 0, s.max_tokens)
    for bias in s.logit_bias.values():
        _within("logit_bias", bias, -1e6, 1e6)


def check_ids(name: str, ids: Iterable[int], vocabulary: int) -> None:
    """Raise RequestRefused, naming the field, for a token id that the vocabulary has not."""
    for token in ids:
        if not 0 <= token < vocabulary:
            raise RequestRefused(
                f"{name} has the token id {token}; the vocabulary has ids 0 to {vocabulary - 1}", param=name
            )


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or value == math.inf:  # NaN is not within anything
        limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise RequestRefused(f"{name} is {value}, but must be {limit}", param=name)
