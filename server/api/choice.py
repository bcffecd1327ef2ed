"""One choice of an answer: the engine's tokens in, pieces of text out, cut at stop strings."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from deltaserve.delta_store.errors import GenerationFailed, QueueFull
from deltaserve.server.api.detokenise import Detokeniser, TokenBytes
from deltaserve.server.api.responses import FinishReason
from deltaserve.server.api.stop_strings import StopStrings
from deltaserve.server.engine.requests import Finished, Token


class TokenStream(Protocol):
    """What the engine gives for one submitted request. ``finished`` is there when the iteration has ended; ``times``
    are when the tokens came, on ``perf_counter``."""

    @property
    def finished(self) -> Finished | None: ...
    @property
    def times(self) -> Sequence[float]: ...
    def __aiter__(self) -> "TokenStream": ...
    async def __anext__(self) -> Token: ...
    def cancel(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that follows the pieces before, and the tokens it came with; ``offsets`` are where each begins in the text.

    The last piece has a ``finish_reason``. Tokens of held-back text come with a later
    piece, at the latest with the last.
    """

    text: str
    tokens: tuple[Token, ...]
    offsets: tuple[int, ...]
    finish_reason: FinishReason | None = None


class Choice:
    """One choice as it is generated. ``completion_tokens`` counts the tokens that were taken from the engine.

    ``outcome`` is its finish reason, ``error`` if it failed, ``refused`` if its turn did not come in time, and
    ``abort`` as long as it has not ended otherwise.
    """

    def __init__(self, stream: TokenStream, token_bytes: TokenBytes, stops: Sequence[str], continues: bool) -> None:
        self._stream = stream
        self._detokeniser = Detokeniser(token_bytes, continues)
        self._stops = StopStrings(stops)
        self._length = 0
        self._waiting: list[tuple[Token, int]] = []
        self._reason: FinishReason | None = None
        self.completion_tokens = 0
        self.outcome: Literal["stop", "length", "error", "refused", "abort"] = "abort"

    @property
    def finished(self) -> Finished | None:
        """How the engine says that it ended, once it has."""
        return self._stream.finished

    @property
    def times(self) -> Sequence[float]:
        """When its tokens came, on ``perf_counter``."""
        return self._stream.times

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended. Raises GenerationFailed if it has not."""
        if self._reason is None:
            raise GenerationFailed("The answer has no end yet")
        return self._reason

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were found in the cache, as far as the engine has told."""
        return self._stream.finished.cached_tokens if self._stream.finished else 0

    async def next_piece(self) -> Piece | None:
        """The next piece, or None after the last one. Raises GenerationFailed."""
        while self._reason is None:
            try:
                token = await anext(self._stream)
            except StopAsyncIteration:
                return self._last_piece()
            except Exception as error:
                self.outcome = "refused" if isinstance(error, QueueFull) else "error"
                raise
            if piece := self._take(token):
                return piece
        return None

    def cancel(self) -> None:
        """Have the engine produce no more of it; does nothing to one that has ended."""
        self._stream.cancel()

    def _take(self, token: Token) -> Piece | None:
        self.completion_tokens += 1
        self._waiting.append((token, self._length))
        text = self._detokeniser.push(token.token_id)
        self._length += len(text)
        released = self._stops.push(text)
        if self._stops.matched:
            self.cancel()
            return self._piece(released, "stop")
        return self._piece(released, None) if released else None

    def _last_piece(self) -> Piece:
        finished = self._stream.finished
        if finished is None or finished.reason == "cancelled":
            self.outcome = "error"
            raise GenerationFailed("The server stopped this request before it was finished; send it again")
        released = self._stops.finish()
        return self._piece(released, "stop" if self._stops.matched else finished.reason)

    def _piece(self, text: str, reason: FinishReason | None) -> Piece:
        tokens, offsets = zip(*self._waiting, strict=True) if self._waiting else ((), ())
        self._waiting = []
        self._reason = reason
        self.outcome = reason or self.outcome
        return Piece(text, tokens, offsets, reason)


class NoTokens:
    """The stream of a request for no token at all, which the engine never sees."""

    def __init__(self, prompt_tokens: int) -> None:
        self.finished = Finished("length", prompt_tokens, 0)
        self.times = array("d")

    def __aiter__(self) -> "NoTokens":
        return self

    async def __anext__(self) -> Token:
        raise StopAsyncIteration

    def cancel(self) -> None:
        """There is nothing to stop."""
