"""What a client wants an answer to look like, written as llguidance reads it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from deltaserve.delta_store.errors import RequestRefused

# Without a bound a model can fill its answer with blanks; this also makes masks several times cheaper.
WHITESPACE = {"whitespace_pattern": r"( |\n {0,32})?"}


def of_schema(schema: Mapping[str, Any]) -> str:
    """JSON that a JSON schema describes; ``x-guidance`` in it overrides ``WHITESPACE``."""
    return LLMatcher.grammar_from_json_schema(json.dumps(_loose(schema)))


def of_regex(pattern: str) -> str:
    """Text that a regular expression matches as a whole."""
    return LLMatcher.grammar_from_regex(pattern)


def of_choices(choices: Sequence[str]) -> str:
    """One of some texts."""
    return LLMatcher.grammar_from_lark("start: " + " | ".join(map(_quoted, choices)))


def of_grammar(grammar: str, field: str) -> str:
    """Text of a context-free grammar in Lark's notation or GBNF. Raises RequestRefused that names ``field``."""
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(grammar))
    except Exception as error:  # the converter raises plain ones, and of any kind
        raise RequestRefused(f"'{field}' is no GBNF grammar: {' '.join(str(error).split())[:300]}", field) from error


def of_calls(
    functions: Mapping[str, Mapping[str, Any]], opening: str, closing: str, *, text: bool, several: bool
) -> str:
    """Calls of functions, given as name: JSON schema of the arguments.

    A call is ``opening``, ``{"name": ..., "arguments": <JSON>``, ``closing``. With ``text`` there may be other text
    around calls, or no call at all; without, calls are all there is. ``several`` allows more than one.
    """
    heads = {name: _quoted(f'{{"name": {json.dumps(name)}, "arguments": ') for name in functions}
    calls = " | ".join(f"{heads[name]} %json {json.dumps(_loose(schema))}" for name, schema in functions.items())
    rules = [f"call: ({calls}) {_quoted(closing)}"]
    if text:
        start = "(opened call)* TEXT" if several else "TEXT | opened call"
        rules += [f"opened[lazy]: TEXT {_quoted(opening)}", r"TEXT: /(.|\n)*/"]
    else:
        again = f' ("\\n" {_quoted(opening)} call)*' if several else ""
        start = f"{_quoted(opening)} call{again}"
    return LLMatcher.grammar_from_lark("\n".join(["%llguidance {}", f"start: {start}", *rules]))


def _loose(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"x-guidance": WHITESPACE, **schema}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
