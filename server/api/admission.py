"""From a checked body to an admitted answer: limits that depend on the model, one engine request for each choice."""

import hashlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from deltaserve.delta_store.errors import ArtifactError, ContextTooLong, GenerationFailed, RequestRefused
from deltaserve.server.api.choice import Choice, NoTokens, Piece, TokenStream
from deltaserve.server.api.merge import merged
from deltaserve.server.api.responses import PromptDetails, Usage
from deltaserve.server.api.schemas import ChatRequest, CompletionRequest, Generation
from deltaserve.server.api.served import Served
from deltaserve.server.engine.grammar import Grammar
from deltaserve.server.engine.requests import Sampling, Turn

# Dividing logits by less than this overflows float16; the answer is the greedy one long before.
LEAST_TEMPERATURE = 0.001


class Answer:
    """All choices of one HTTP request: ``n`` for each prompt, in order."""

    def __init__(self, served: Served, prompts: Sequence[Sequence[int]], choices: Sequence[Choice]) -> None:
        self.served = served
        self.choices = choices
        self._prompts = prompts

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece]]:
        """Each choice's pieces with its index, as they come."""
        async with aclosing(merged([choice.next_piece for choice in self.choices])) as merging:
            async for indexed in merging:
                yield indexed

    async def by_choice(self) -> list[list[Piece]]:
        """All pieces of each choice, when all have ended."""
        collected: list[list[Piece]] = [[] for _ in self.choices]
        async for index, piece in self.pieces():
            collected[index].append(piece)
        return collected

    def usage(self) -> Usage:
        """Token counts so far."""
        prompt = sum(len(ids) for ids in self._prompts)
        completion = sum(choice.completion_tokens for choice in self.choices)
        first_of_each_prompt = self.choices[:: len(self.choices) // len(self._prompts)]
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptDetails(cached_tokens=sum(c.cached_tokens for c in first_of_each_prompt)),
        )

    @property
    def refused(self) -> bool:
        """Whether its turn did not come in time."""
        return any(choice.outcome == "refused" for choice in self.choices)

    def cancel(self) -> None:
        """Stop what still runs."""
        for choice in self.choices:
            choice.cancel()


async def admit(
    engine: Any,
    served: Served,
    prompts: Sequence[Sequence[int]],
    body: ChatRequest | CompletionRequest,
    default_limit: int | None,
    grammar: Grammar | None = None,
) -> Answer:
    """Submit ``body.n`` requests for each prompt: all of them, or none.

    ``default_limit`` is the most tokens of a choice for a body that does not say (None: what the context leaves).
    Raises RequestRefused, ContextTooLong, QueueFull, EngineDown, GenerationFailed.
    """
    limit = default_limit if body.token_limit is None else body.token_limit
    limits = [room_for(len(ids), engine.context_length, limit, body.prompt_field) for ids in prompts]
    vocabulary = engine.vocab_size if served.version is None else max(engine.vocab_size, served.tokeniser.vocabulary)
    check_ids(body, prompts, vocabulary)
    choices: list[Choice] = []
    turn = Turn()
    try:
        for ids, most in zip(prompts, limits, strict=True):
            for index in range(body.n):
                stream = await submitted(engine, served, ids, sampling(body, most, index, grammar), turn)
                choices.append(Choice(stream, served.tokeniser.token_bytes, body.stop, body.continues))
    except BaseException:
        for choice in choices:
            choice.cancel()
        raise
    return Answer(served, prompts, choices)


async def submitted(engine: Any, served: Served, ids: Sequence[int], chosen: Sampling, turn: Turn) -> TokenStream:
    """The engine's stream for one choice."""
    if chosen.max_tokens == 0:
        return NoTokens(len(ids))
    try:
        stream: TokenStream = await engine.submit(ids, served.version, chosen, turn)
    except ArtifactError as error:
        # Whoever uploaded it was told what was wrong with it; for whoever asks it, the server fails.
        raise GenerationFailed(f"The model {served.name!r} cannot be loaded: {error}") from error
    return stream


def check_ids(body: Generation, prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Refuse what refers to tokens that the model does not have."""
    allowed = f"token ids from 0 to {vocabulary - 1}"
    for token in (token for ids in prompts for token in ids):
        if not 0 <= token < vocabulary:
            raise RequestRefused(f"'prompt' must hold {allowed}; got {token}", "prompt")
    for token in body.logit_bias:
        if not 0 <= token < vocabulary:
            raise RequestRefused(f"'logit_bias' must hold {allowed}; got {token}", "logit_bias")
    if body.top_k > vocabulary:
        raise RequestRefused(
            f"'top_k' must be a whole number from -1 to {vocabulary}, the vocabulary; got {body.top_k}", "top_k"
        )


def room_for(prompt_tokens: int, context: int, limit: int | None, field: str) -> int:
    """The most tokens that the answer may have: ``limit``, or what the context leaves if that is less.

    Raises RequestRefused for an empty prompt, ContextTooLong if not a single token would fit; both name ``field``.
    """
    if prompt_tokens == 0:
        raise RequestRefused("The prompt is empty; send at least one token", field)
    if prompt_tokens >= context and limit != 0:
        raise ContextTooLong(
            f"The model's context is {context} tokens, prompt and answer together; the prompt alone has "
            f"{prompt_tokens}. Shorten it to at most {context - 1}",
            field,
        )
    room = max(context - prompt_tokens, 0)
    return room if limit is None else min(limit, room)


def sampling(body: ChatRequest | CompletionRequest, most: int, index: int, grammar: Grammar | None = None) -> Sampling:
    """How choice number ``index`` of a prompt is drawn."""
    if body.min_tokens > most:
        raise RequestRefused(
            f"'min_tokens' must be at most {most}, the most tokens that this answer may have; got {body.min_tokens}",
            "min_tokens",
        )
    return Sampling(
        max_tokens=most,
        temperature=body.temperature if body.temperature >= LEAST_TEMPERATURE else 0.0,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        seed=derived_seed(body.seed, index),
        logit_bias=dict(body.logit_bias),
        logprobs=body.alternatives,
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        grammar=grammar,
    )


def derived_seed(seed: int | None, index: int) -> int | None:
    """The seed of a prompt's choice number ``index``: the given one for the first, others made from it.

    So the choices of ``n`` > 1 differ from each other, and all repeat.
    """
    if seed is None or index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
