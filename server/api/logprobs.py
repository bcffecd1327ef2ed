"""Log-probabilities in OpenAI's two forms; minus infinity is written as -9999.0, since JSON has no word for it."""

from collections.abc import Sequence

from deltaserve.server.api.choice import Piece
from deltaserve.server.api.detokenise import TokenBytes
from deltaserve.server.api.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from deltaserve.server.engine.requests import Token

LEAST = -9999.0


def chat_logprobs(pieces: Sequence[Piece], token_bytes: TokenBytes) -> ChatLogprobs:
    """One entry for each token of ``pieces``, with the most likely ones beside it."""
    return ChatLogprobs(
        content=[
            TokenLogprob(
                **_entry(token.token_id, token.logprob, token_bytes).model_dump(),
                top_logprobs=[_entry(other, logprob, token_bytes) for other, logprob in token.top],
            )
            for piece in pieces
            for token in piece.tokens
        ],
        refusal=None,
    )


def completion_logprobs(pieces: Sequence[Piece], token_bytes: TokenBytes) -> CompletionLogprobs:
    """The older form; the chosen token is always among its ``top_logprobs``."""
    tokens = [token for piece in pieces for token in piece.tokens]
    return CompletionLogprobs(
        tokens=[_label(token.token_id, token_bytes) for token in tokens],
        token_logprobs=[_finite(token.logprob) for token in tokens],
        top_logprobs=[_alternatives(token, token_bytes) for token in tokens],
        text_offset=[offset for piece in pieces for offset in piece.offsets],
    )


def _entry(token: int, logprob: float | None, token_bytes: TokenBytes) -> TopLogprob:
    data = token_bytes.named(token)
    return TopLogprob(token=data.decode(errors="backslashreplace"), logprob=_finite(logprob), bytes=list(data))


def _alternatives(token: Token, token_bytes: TokenBytes) -> dict[str, float]:
    """By label, the likeliest first; of tokens that share a label the likeliest counts, but the chosen one always."""
    ranked = {_label(other, token_bytes): _finite(logprob) for other, logprob in reversed(token.top)}
    return dict(reversed(ranked.items())) | {_label(token.token_id, token_bytes): _finite(token.logprob)}


def _label(token: int, token_bytes: TokenBytes) -> str:
    """The token's text, or ``bytes:\\xe2\\x80`` for part of a character."""
    data = token_bytes.named(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float | None) -> float:
    """Into [-9999, 0]: rounding may lift a certain token's value above 0."""
    return LEAST if logprob is None else min(0.0, max(LEAST, logprob))
