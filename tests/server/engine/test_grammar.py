"""Grammars: what they allow, which are refused and why, and that a row follows its own and no other."""

import asyncio
import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_variants import SMALL, collect
from tiny_models import save, tiny_llama, tiny_tokenizer

from deltaserve.delta_store.errors import GenerationFailed, RequestRefused
from deltaserve.server.engine import grammar_text
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.grammar import Grammar, Grammars
from deltaserve.server.engine.requests import Sampling, Token
from deltaserve.server.engine.sampler import Chooser, choose

VOCABULARY = 260
END = 0
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"mood": {"enum": ["sad", "glad"]}, "ages": {"type": "array", "items": {"type": "integer"}}},
    "required": ["mood", "ages"],
    "additionalProperties": False,
}


@cache
def grammars() -> Grammars:
    return Grammars(tiny_tokenizer(VOCABULARY))


def compiled(text: str) -> Grammar:
    return grammars().compiled(text, "field")


def follows(grammar: Grammar, text: str) -> bool:
    """Whether the whole of ``text`` is an answer."""
    path = grammar.begin()
    logits = torch.zeros(VOCABULARY)
    for token in tiny_tokenizer(VOCABULARY)(text).input_ids:
        if not math.isfinite(path.allowed(logits, {END})[token]):
            return False
        path.take(token)
    return path.ended or math.isfinite(path.allowed(logits, {END})[END])


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        (grammar_text.of_regex("[ab]{2}c?"), ["ab", "bbc"], ["a", "abcc", "xy", ""]),
        (grammar_text.of_choices(["yes", 'n"o', "é\n"]), ["yes", 'n"o', "é\n"], ["ye", "yesn", "no"]),
        (grammar_text.of_grammar('start: "a" start "b" | "c"', ""), ["c", "aacbb"], ["ac", "acbb"]),
        (grammar_text.of_grammar('root ::= "a" root "b" | "c"', ""), ["c", "aacbb"], ["ac", "acbb"]),
        (
            grammar_text.of_schema(SCHEMA),
            ['{"mood":"sad","ages":[]}', '{\n  "mood": "glad",\n  "ages": [1, -20]\n}'],
            ['{"mood":"bad","ages":[]}', '{"mood":"sad"}', '{"mood":"sad","ages":[1.5]}', '{  "mood":"sad","ages":[]}'],
        ),
        (grammar_text.of_schema({"type": "object"}), ["{}", '{"a": [null, {"b": "é"}]}'], ["[]", "1", "{}{}"]),
    ],
)
def test_a_grammar_allows_what_it_describes_and_nothing_else(text: str, good: list[str], bad: list[str]) -> None:
    grammar = compiled(text)
    assert [follows(grammar, answer) for answer in good] == [True] * len(good)
    assert [follows(grammar, answer) for answer in bad] == [False] * len(bad)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (grammar_text.of_schema({"type": "objekt"}), "objekt"),
        (grammar_text.of_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (grammar_text.of_schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
        (grammar_text.of_schema({"$ref": "http://example.com/x"}), "example.com"),
        (grammar_text.of_schema({"type": "string", "pattern": "("}), "unclosed group"),
        (grammar_text.of_regex("(a"), "unclosed group"),
        (grammar_text.of_regex("(?=a)b"), "look-around"),
        (grammar_text.of_grammar("start: foo", ""), "foo"),
        (grammar_text.of_regex("a" * 300_000), "262144 characters"),
    ],
)
def test_a_bad_grammar_is_refused_with_its_fault(text: str, fault: str) -> None:
    with pytest.raises(RequestRefused, match=fault) as refused:
        compiled(text)
    assert refused.value.param == "field"
    assert "\n" not in str(refused.value)


def test_text_that_is_no_grammar_in_either_notation_is_refused() -> None:
    with pytest.raises(RequestRefused, match="'grammar'"):
        grammar_text.of_grammar("root ::= (", "grammar")


def test_a_grammar_is_compiled_once() -> None:
    text = grammar_text.of_regex("once")
    assert compiled(text) is compiled(text)


def test_each_row_follows_its_own_grammar_and_a_failed_one_fails_alone() -> None:
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0))
    greedy = Sampling(max_tokens=9, temperature=0)
    constrained = replace(greedy, grammar=compiled(grammar_text.of_choices(["ab", "cd"])))
    plain, one, failing, two = (Chooser(s, [5], {END}) for s in (greedy, constrained, constrained, constrained))
    for chosen in ("a", "b"):
        (token,) = tiny_tokenizer(VOCABULARY)(chosen).input_ids
        logits[1, token] = logits[3, token] = 99
        if chosen == "b":
            failing._path = Broken()  # type: ignore[assignment]
        results = choose(logits, [plain, one, failing, two])
        assert results[0] == Token(int(logits[0].argmax()))
        assert results[1] == results[3] == Token(token)
    assert isinstance(results[2], GenerationFailed)
    assert one.ended
    assert not plain.ended


class Broken:
    def allowed(self, *_: object) -> torch.Tensor:
        raise GenerationFailed("broken")


def test_an_end_token_is_allowed_where_the_grammar_may_end_and_nowhere_else() -> None:
    (a,) = tiny_tokenizer(VOCABULARY)("a").input_ids
    logits = torch.zeros(VOCABULARY)
    logits[END] = 9
    chooser = Chooser(Sampling(max_tokens=9, temperature=0, grammar=compiled(grammar_text.of_regex("a+"))), [5], {END})
    assert [choose(logits[None], [chooser]) for _ in range(2)] == [[Token(a)], [Token(END)]]
    endless = replace(chooser.sampling, ignore_eos=True)
    chooser = Chooser(endless, [5], {END})
    assert [choose(logits[None], [chooser]) for _ in range(5)] == [[Token(a)]] * 5


def test_logprobs_stay_the_model_s_own() -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(max_tokens=9, temperature=0, logprobs=2, grammar=compiled(grammar_text.of_choices(["a", "b"])))
    (token,) = choose(logits[None], [Chooser(sampling, [5], {END})])
    assert isinstance(token, Token)
    assert token.logprob == pytest.approx(float(logits.log_softmax(0)[token.token_id]))
    assert [i for i, _ in token.top] == logits.topk(2).indices.tolist()


def test_a_grammar_that_no_token_can_go_on_with_fails_the_request() -> None:
    path = compiled(grammar_text.of_choices(["Z"])).begin()
    with pytest.raises(GenerationFailed, match="cannot write"):
        path.allowed(torch.zeros(20), {END})


def test_a_tokenizer_that_is_not_understood_is_refused_by_name() -> None:
    with pytest.raises(RequestRefused, match=r"'field' is not supported with this model's tokenizer.*Fuse"):
        Grammars(tiny_tokenizer(20)).compiled(grammar_text.of_choices(["Z"]), "field")


def test_mixed_batches_end_with_their_grammars(tmp_path: Path) -> None:
    """Constrained requests, sampled and greedy, beside a free one that must not notice."""
    tokenizer = tiny_tokenizer(VOCABULARY)
    engine = Engine(save(tiny_llama(vocab=VOCABULARY), tmp_path, vocab=VOCABULARY), limits=SMALL)
    free = Sampling(max_tokens=60, temperature=0, ignore_eos=True)
    schema = compiled(grammar_text.of_schema(SCHEMA))
    constrained = [
        replace(free, grammar=compiled(grammar_text.of_choices(["yes", "no"]))),
        *(replace(free, temperature=1.0, seed=seed, grammar=schema, max_tokens=150) for seed in range(4)),
    ]

    async def main() -> None:
        alone = await collect(engine, [5, 9], None, free)
        streams = [await engine.submit([5, 9], None, sampling) for sampling in [free, *constrained]]
        ids = [[token.token_id async for token in stream] for stream in streams]
        texts = [tokenizer.decode(tokens) for tokens in ids]
        assert ids[0] == alone
        assert texts[1] in ("yes", "no")
        for stream, text in zip(streams[2:], texts[2:], strict=True):
            assert stream.finished is not None
            if stream.finished.reason == "stop":
                assert json.loads(text)["mood"] in ("sad", "glad")
        assert {stream.finished.reason for stream in streams[1:] if stream.finished} >= {"stop"}
        assert streams[1].finished is not None
        assert streams[1].finished.completion_tokens == len(ids[1])
        assert engine.requests == 0

    engine.start()
    try:
        asyncio.run(main())
    finally:
        engine.stop()
