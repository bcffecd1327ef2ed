"""From token ids to text, one token at a time, without ever showing part of a character.

Each token stands for some bytes of UTF-8, which may be part of a character; an incremental UTF-8 decoder keeps an
unfinished character back until it is complete. Bytes that are no UTF-8 come out as U+FFFD as soon as that is certain.
Bytes of a character that is unfinished when the answer ends are dropped, streaming or not.
"""

import codecs
import re
from collections.abc import Set

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_REPLACEMENT = "\ufffd"


class TokenBytes:
    """The bytes that each token of one tokenizer adds to a text; special tokens add none."""

    def __init__(self, tokenizer: Tokenizer, special: Set[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._anchor = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
        self._inside: dict[int, bytes] = {}
        self._opening: dict[int, bytes] = {}

    def inside(self, token: int) -> bytes:
        """What ``token`` adds after other text, its leading blank included."""
        if token not in self._inside:
            before = self._decode(self._anchor)
            self._inside[token] = self._bytes(token, self._decode([*self._anchor, token]).removeprefix(before))
        return self._inside[token]

    def opening(self, token: int) -> bytes:
        """What ``token`` adds where a text begins: a tokenizer that marks blanks has none there."""
        if token not in self._opening:
            self._opening[token] = self._bytes(token, self._decode([token]))
        return self._opening[token]

    def named(self, token: int) -> bytes:
        """What to call ``token`` in a list: a special token by its name, any other by its bytes."""
        if token in self._special:
            return (self._tokenizer.id_to_token(token) or "").encode()
        return self.inside(token)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def _bytes(self, token: int, text: str) -> bytes:
        if token in self._special:
            return b""
        if _REPLACEMENT not in text:
            return text.encode()
        written = self._tokenizer.id_to_token(token) or ""
        if found := _BYTE_TOKEN.fullmatch(written):
            return bytes([int(found[1], 16)])
        if all(character in _BYTE_OF for character in written):
            return bytes(_BYTE_OF[character] for character in written)
        return text.encode()


class Detokeniser:
    """The text of one answer as it grows. ``continues`` says that it goes on after other text."""

    def __init__(self, token_bytes: TokenBytes, continues: bool) -> None:
        self._token_bytes = token_bytes
        self._begun = continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that are complete with this token."""
        added = self._token_bytes.inside(token) if self._begun else self._token_bytes.opening(token)
        self._begun = self._begun or bool(added)
        return self._utf8.decode(added)


def _byte_alphabet() -> dict[str, int]:
    """Byte-level vocabularies write a printable Latin-1 byte as itself and the others, in order, from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
