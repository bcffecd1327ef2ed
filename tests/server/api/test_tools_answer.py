"""Tool calls found in text that arrives in pieces."""

from hypothesis import given
from hypothesis import strategies as st

from deltaserve.server.api.tools_answer import Argued, Called, CallReader, Said

ONE = '<tool_call>\n{"name": "get", "arguments": {"city": "a}\\n</tool_call>"}}\n</tool_call>'
TWO = '<tool_call>\n{"name": "put", "arguments": {}}\n</tool_call>'


def read(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and each call's name and arguments."""
    reader, text, calls = CallReader(), "", []
    for event in [*(event for piece in pieces for event in reader.push(piece)), *reader.finish()]:
        match event:
            case Said(said):
                text += said
            case Called(index, name, _):
                assert index == len(calls)
                calls.append((name, ""))
            case Argued(index, more):
                calls[index] = (calls[index][0], calls[index][1] + more)
    return text, calls


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted(place % (len(text) + 1) for place in places)
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@given(st.lists(st.integers(0, 500)))
def test_any_division_into_pieces_gives_the_same_calls(places: list[int]) -> None:
    arguments = '{"city": "a}\\n</tool_call>"}'
    assert read(cut(ONE, places)) == ("", [("get", arguments)])
    assert read(cut(f"Sure <tool.\n{ONE}\n{TWO}\n", places)) == ("Sure <tool.", [("get", arguments), ("put", "{}")])
    assert read(cut(f"\n\n{TWO} bye", places)) == (" bye", [("put", "{}")])


@given(st.text("<tol_ca>\n ", max_size=40), st.lists(st.integers(0, 500)))
def test_text_without_a_call_comes_out_as_it_is(text: str, places: list[int]) -> None:
    assert read(cut(text, places)) == (text, [])


def test_text_is_let_out_as_soon_as_it_cannot_begin_a_call() -> None:
    reader = CallReader()
    assert reader.push("a <tool") == [Said("a")]
    assert reader.push("box") == [Said(" <toolbox")]


def test_an_answer_cut_off_inside_a_call_keeps_what_came() -> None:
    assert read(['<tool_call>\n{"name": "get", "arguments": {"city": "Par']) == ("", [("get", '{"city": "Par')])
    assert read(['<tool_call>\n{"name": "ge']) == ('<tool_call>\n{"name": "ge', [])
