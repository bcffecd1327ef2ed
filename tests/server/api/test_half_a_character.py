"""Characters made of several tokens (case E-half-a-character)."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import Script, ids, scripted_tokenizer
from tokenizers import Tokenizer, decoders, models

from deltaserve.server.api.detokenise import Detokeniser, TokenBytes

ASK: dict[str, Any] = {"model": "base", "prompt": "hi", "max_tokens": 60}
TEXTS = {
    "emoji": "😀",
    "joiner and skin tone": "👩🏽‍🚀!",
    "CJK": "日本語",
    "accent": "é",
    "decomposed accent": "e\u0301",
    "mixed": " a 😀b ",
}
BYTE_LEVEL = scripted_tokenizer()


def said(service: Any, **more: Any) -> tuple[str, list[str], Any]:
    """The whole text, the streamed pieces, and the usage, which must be the same in both."""
    client = service.openai()
    whole = client.completions.create(**ASK | more)
    *chunks, last = client.completions.create(**ASK | more, stream=True, stream_options={"include_usage": True})
    assert last.usage == whole.usage
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    return whole.choices[0].text, [chunk.choices[0].text for chunk in chunks], whole.usage


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_e_half_a_character(service: Any, text: str) -> None:
    service.say(text)
    whole, pieces, usage = said(service)
    assert whole == "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert usage.completion_tokens == len(text.encode())


def test_e_half_a_character_cut_by_max_tokens(service: Any) -> None:
    service.say("ab😀")
    whole, pieces, usage = said(service, max_tokens=4)
    assert whole == "".join(pieces) == "ab"
    assert usage.completion_tokens == 4


def test_e_half_a_character_as_a_stop_string(service: Any) -> None:
    service.say("ab😀cd")
    whole, pieces, usage = said(service, stop="😀")
    assert whole == "".join(pieces) == "ab"
    assert usage.completion_tokens == 6


def test_e_half_a_character_invalid_bytes_do_not_hold_the_stream(service: Any) -> None:
    data = b"ab\xff\xff\xf0\x9fcd\xc3"
    service.say(data)
    whole, pieces, _ = said(service)
    assert whole == "".join(pieces) == "ab\ufffd\ufffd\ufffdcd"
    assert pieces.index("\ufffd") == 2


@given(st.binary(max_size=30))
def test_any_bytes_give_what_a_utf8_decoder_gives(data: bytes) -> None:
    detokeniser = Detokeniser(TokenBytes(BYTE_LEVEL.backend_tokenizer, frozenset()), continues=True)
    text = "".join(detokeniser.push(token) for token in ids(BYTE_LEVEL, data))
    whole = data.decode(errors="replace")
    assert whole.startswith(text)
    assert whole[len(text) :] in ("", "\ufffd")  # only an unfinished tail is dropped


def sentencepiece_like() -> Tokenizer:
    """Blanks marked by U+2581, bytes as ``<0xNN>``, a first blank stripped: as Llama 2's."""
    tokens = ["<unk>", "a", "▁Hello", "▁world", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize(("continues", "text"), [(False, "Hello world😀!"), (True, " Hello world😀!")])
def test_e_half_a_character_with_marked_blanks(continues: bool, text: str) -> None:
    tokenizer = sentencepiece_like()
    tokens = [2, 3, *(tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()), 4]
    detokeniser = Detokeniser(TokenBytes(tokenizer, frozenset()), continues)
    pieces = [detokeniser.push(token) for token in tokens]
    assert "".join(pieces) == text
    assert pieces[2:5] == ["", "", ""]


def test_special_tokens_have_no_text(service: Any) -> None:
    service.engine.script = lambda *_: Script([1, *ids(BYTE_LEVEL, "a"), 1, *ids(BYTE_LEVEL, "b")])
    whole, pieces, usage = said(service)
    assert whole == "".join(pieces) == "ab"
    assert usage.completion_tokens == 4
