"""Grammars that answers must follow: llguidance compiles one for a tokenizer, each request goes its own way in it."""

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

import numpy
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from deltaserve.delta_store.errors import GenerationFailed, RequestRefused

KEPT = 256
"""Grammars kept compiled for each tokenizer."""
LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
MOST_CHARACTERS = 2**18


class Grammar:
    """A compiled grammar; any number of requests may follow it at once."""

    def __init__(self, start: LLMatcher, own_ends: Sequence[int]) -> None:
        self._start, self._own_ends = start, own_ends

    def begin(self) -> "Path":
        """One answer's way through it."""
        return Path(self._start.deep_copy(), self._own_ends)


class Path:
    """How far one answer has come in its grammar. Not safe to use from several threads.

    ``own_ends`` are the end tokens that llguidance knows of; the engine's count, which are the version's.
    """

    def __init__(self, matcher: LLMatcher, own_ends: Sequence[int]) -> None:
        self._matcher, self._own_ends = matcher, own_ends

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and nothing can follow."""
        return self._matcher.is_stopped()

    def allowed(self, logits: Tensor, stop_ids: Collection[int]) -> Tensor:
        """``logits``, float32 ``[vocabulary]``, with minus infinity for tokens that the grammar has no place for here.

        ``stop_ids`` are allowed where the answer may end, and nowhere else. Raises GenerationFailed if no token is.
        """
        bits = numpy.unpackbits(numpy.frombuffer(self._matcher.compute_bitmask(), numpy.uint8), bitorder="little")
        if self._matcher.is_error():
            raise GenerationFailed(f"The grammar cannot be followed any further: {first_line(self._matcher)}")
        fits = torch.zeros(len(logits), dtype=torch.bool)
        fits[: len(bits)] = torch.from_numpy(bits[: len(logits)])
        for ends, may_end in ((self._own_ends, False), (stop_ids, self._matcher.is_accepting())):
            fits[[token for token in ends if token < len(logits)]] = may_end
        if not fits.any():
            raise GenerationFailed("The grammar asks for text that this model's tokenizer cannot write")
        return logits.masked_fill(~fits.to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """``token``, which is no end token, was chosen. Raises GenerationFailed if the grammar has no place for it."""
        if not self._matcher.consume_token(token):
            raise GenerationFailed(f"The grammar has no place for the chosen token: {first_line(self._matcher)}")


class Grammars:
    """The grammars of one tokenizer, those used last kept. Safe to use from several threads; compiling takes a while.

    ``tokenizer`` is a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()

    def compiled(self, text: str, field: str) -> Grammar:
        """The grammar that llguidance reads in ``text``. Raises RequestRefused that names ``field`` and the fault."""
        with self._lock:
            if text in self._kept:
                self._kept.move_to_end(text)
                return self._kept[text]
            vocabulary = self._read_vocabulary(field)
        grammar = Grammar(_compile(vocabulary, text, field), vocabulary.eos_tokens)
        with self._lock:
            self._kept[text] = grammar
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return grammar

    def _read_vocabulary(self, field: str) -> LLTokenizer:
        if self._vocabulary is None:
            try:
                description = self._tokenizer.backend_tokenizer.to_str()
                self._vocabulary = LLTokenizer(description, eos_token=self._tokenizer.eos_token_id)
            except (ValueError, RuntimeError) as error:
                raise RequestRefused(
                    f"'{field}' is not supported with this model's tokenizer: {error}; leave it out", field
                ) from error
        return self._vocabulary


def _compile(vocabulary: LLTokenizer, text: str, field: str) -> LLMatcher:
    if len(text) > MOST_CHARACTERS:
        raise RequestRefused(
            f"'{field}' must have at most {MOST_CHARACTERS} characters; it has {len(text)}, written out", field
        )
    start = LLMatcher(vocabulary, text, log_level=0, limits=LIMITS)
    if not start.is_error():
        start.compute_bitmask()  # what can never be followed fails here, and every request finds this mask made
    if start.is_error():
        raise RequestRefused(f"'{field}' cannot be used as a grammar: {first_line(start)}", field)
    return start


def first_line(matcher: LLMatcher) -> str:
    """What is wrong with it, in one line."""
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    told = [line for line in lines if line and not set(line) <= set("^ ") and "|" not in line]
    return "; ".join(told)[:300]
