"""The parts of a chat answer: its text, and its tool calls where the client sent tools."""

from collections.abc import Sequence

from deltaserve.server.api.choice import Piece
from deltaserve.server.api.responses import (
    CalledFunction,
    ChatDelta,
    ChatFinishReason,
    ChatMessage,
    FinishReason,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from deltaserve.server.api.schemas import ChatRequest
from deltaserve.server.api.tools import Named
from deltaserve.server.api.tools_answer import Argued, Called, CallReader, Event, Said


class Parts:
    """One choice's pieces in, its parts out. ``calls`` None: all of it is text.

    With ``forced``, the client named the function: as with OpenAI the answer then ends by ``stop``.
    """

    def __init__(self, calls: CallReader | None, forced: bool) -> None:
        self._calls, self._forced = calls, forced

    def read(self, piece: Piece) -> Sequence[Event]:
        """What is certain with the next piece."""
        if self._calls is None:
            return [Said(piece.text)] if piece.text else []
        return [*self._calls.push(piece.text), *(self._calls.finish() if piece.finish_reason else ())]

    def reason(self, reason: FinishReason) -> ChatFinishReason:
        """How the choice ended, as OpenAI says it."""
        called = self._calls is not None and self._calls.calls > 0
        return "tool_calls" if called and reason == "stop" and not self._forced else reason

    def message(self, events: Sequence[Event]) -> ChatMessage:
        """The whole answer."""
        text = "".join(event.text for event in events if isinstance(event, Said))
        calls = [
            ToolCall(id=call.id, function=CalledFunction(name=call.name, arguments=_arguments(events, call.index)))
            for call in events
            if isinstance(call, Called)
        ]
        return ChatMessage(role="assistant", content=text or (None if calls else ""), tool_calls=calls or None)

    def delta(self, event: Event) -> ChatDelta:
        """One part of a streamed answer."""
        match event:
            case Said(text):
                return ChatDelta(content=text)
            case Called(index, name, call_id):
                function = FunctionDelta(name=name, arguments="")
                return ChatDelta(
                    tool_calls=[ToolCallDelta(index=index, id=call_id, type="function", function=function)]
                )
            case Argued(index, text):
                return ChatDelta(tool_calls=[ToolCallDelta(index=index, function=FunctionDelta(arguments=text))])


def reader(body: ChatRequest) -> Parts:
    """The parts of one choice of an answer to ``body``."""
    return Parts(CallReader() if body.callable_tools else None, isinstance(body.tool_choice, Named))


def _arguments(events: Sequence[Event], index: int) -> str:
    return "".join(event.text for event in events if isinstance(event, Argued) and event.index == index)
