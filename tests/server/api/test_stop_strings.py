"""Stop strings in text that arrives in pieces, and over HTTP (case E-stop-string-leaks)."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import Script, words

from deltaserve.server.api.stop_strings import StopStrings

LISTS: list[tuple[Any, str, str]] = [
    (["PQRSTU"], "MNO", "stop"),
    (["PQRZ"], "MNOPQRSTU VWX", "stop"),
    (["ST", "RST"], "MNOPQ", "stop"),
    (["P"], "MNO", "stop"),
    ("P", "MNO", "stop"),
    ("X", "MNOPQRSTU VW", "stop"),
    (["WXY", "X"], "MNOPQRSTU VW", "stop"),
    (None, "MNOPQRSTU VWX", "stop"),
    ([], "MNOPQRSTU VWX", "stop"),
    (["hi"], "MNOPQRSTU VWX", "stop"),
]


def cut(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, bool, list[str]]:
    """The text, whether a stop string was found, and what was let out piece by piece."""
    matcher, out = StopStrings(stops), []
    for piece in pieces:
        out.append(matcher.push(piece))
        if matcher.matched:
            break
    else:
        out.append(matcher.finish())
    return "".join(out), matcher.matched, out


@given(
    st.lists(st.text("ab", max_size=6), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
)
def test_any_division_into_pieces_is_cut_where_the_first_stop_string_begins(
    pieces: list[str], stops: list[str]
) -> None:
    whole = "".join(pieces)
    starts = [start for stop in stops if (start := whole.find(stop)) >= 0]
    text, matched, _ = cut(pieces, stops)
    assert (text, matched) == (whole[: min(starts, default=len(whole))], bool(starts))


def test_held_back_text_is_let_out_as_soon_as_it_cannot_match() -> None:
    assert cut(["MN", "OPQ", "RS", "T"], ["PQRZ"])[2] == ["MN", "O", "PQRS", "T", ""]


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize(("stop", "text", "reason"), LISTS)
def test_e_stop_string_leaks(service: Any, route: str, stop: Any, text: str, reason: str) -> None:
    service.engine.script = lambda *_: Script(words(service.engine.tokenizer))
    client = service.openai()
    if route == "chat":
        make, ask = client.chat.completions.create, {"messages": [{"role": "user", "content": "hi"}]}
    else:
        make, ask = client.completions.create, {"prompt": "hi"}
    whole = make(model="base", stop=stop, **ask)
    chunks = list(make(model="base", stop=stop, stream=True, stream_options={"include_usage": True}, **ask))
    streamed = [c.choices[0].delta.content or "" if route == "chat" else c.choices[0].text for c in chunks[:-1]]
    assert (whole.choices[0].message.content if route == "chat" else whole.choices[0].text) == text
    assert "".join(streamed) == text
    assert whole.choices[0].finish_reason == chunks[-2].choices[0].finish_reason == reason
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens


@pytest.mark.parametrize("stop", ["", ["ok", ""], ["a", "b", "c", "d", "e"], 5, [5], {"a": 1}, "x" * 1001])
def test_e_stop_string_leaks_bad_lists_are_refused_by_name(service: Any, stop: Any) -> None:
    with service.http() as http:
        answer = http.post("/v1/completions", json={"model": "base", "prompt": "hi", "stop": stop})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "stop"
    assert service.engine.submitted == []
