import asyncio
from collections.abc import AsyncIterator

import pytest

from deltaserve.server.bench.events import StreamError, error_message, parse, payloads

STREAM = 'event: message\r\ndata: {"a": "zwei\u2028Zeilen"}\r\n\r\n: ping\n\ndata:[1]\n\ndata: [DONE]\n\n'.encode()


def read(size: int) -> list[bytes]:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(STREAM), size):
            yield STREAM[start : start + size]

    async def collect() -> list[bytes]:
        return [payload async for payload in payloads(chunks())]

    return asyncio.run(collect())


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_payloads_however_the_network_cuts_them(size: int) -> None:
    assert read(size) == ['{"a": "zwei\u2028Zeilen"}'.encode(), b"[1]", b"[DONE]"]


@pytest.mark.parametrize(
    ("payload", "has_text"),
    [
        (b'{"choices": [{"delta": {"role": "assistant", "content": ""}}]}', False),
        (b'{"choices": [{"delta": {}, "finish_reason": "stop"}]}', False),
        (b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}', False),
        (b'{"choices": [{"delta": {"content": " "}}]}', True),
        (b'{"choices": [{"delta": {"reasoning_content": "hm"}}]}', True),
        (b'{"choices": [{"text": "word", "logprobs": null}], "error": null}', True),
        (b'{"choices": [{"text": ""}]}', False),
    ],
)
def test_only_text_is_a_token(payload: bytes, has_text: bool) -> None:
    assert parse(payload).has_text is has_text


@pytest.mark.parametrize("payload", [b"{", b"[1]", b'{"choices": [3]}', b'{"choices": "none"}'])
def test_what_is_no_event_fails_the_request_and_not_the_run(payload: bytes) -> None:
    with pytest.raises(StreamError, match="not an event"):
        parse(payload)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ({"error": {"message": "too long", "code": 3}}, "too long"),
        ({"message": "too long"}, "too long"),
        ({"detail": "Not Found"}, "{'detail': 'Not Found'}"),
        ("plain", "plain"),
    ],
)
def test_error_message_is_found_where_it_is(error: object, message: str) -> None:
    assert error_message(error) == message
