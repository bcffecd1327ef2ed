"""Context limits, and absent, null or zero token limits (case E-length-limits). The context is 64 tokens."""

from typing import Any

import pytest
from scripted_engine import Script

ENDLESS = Script([50], endless=True)
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
FRAME = len("user: \nassistant: ")  # what the tiny chat template puts around a message


@pytest.fixture(autouse=True)
def _endless(service: Any) -> None:
    service.engine.script = lambda *_: ENDLESS


def asked(service: Any, route: str, prompt_tokens: int, **fields: Any) -> tuple[int, dict[str, Any]]:
    prompt: dict[str, Any] = {"prompt": [50] * prompt_tokens}
    if route == CHAT:
        prompt = {"messages": [{"role": "user", "content": "x" * (prompt_tokens - FRAME)}]}
    with service.http() as http:
        answer = http.post(route, json={"model": "base", **prompt, **fields})
    return answer.status_code, answer.json()


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("prompt_tokens", [64, 65, 200])
@pytest.mark.parametrize("limit", [{}, {"max_tokens": 1}, {"max_tokens": 1000}])
def test_e_length_limits_no_room(service: Any, route: str, prompt_tokens: int, limit: dict[str, int]) -> None:
    status, body = asked(service, route, prompt_tokens, **limit)
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert "64 tokens" in body["error"]["message"]
    assert f"has {prompt_tokens}." in body["error"]["message"]
    assert body["error"]["param"] == ("messages" if route == CHAT else "prompt")
    assert service.engine.submitted == []


@pytest.mark.parametrize(
    ("route", "prompt_tokens", "limit", "completion_tokens"),
    [
        (COMPLETIONS, 63, {}, 1),
        (COMPLETIONS, 10, {}, 16),
        (COMPLETIONS, 10, {"max_tokens": None}, 16),
        (COMPLETIONS, 10, {"max_tokens": 1}, 1),
        (COMPLETIONS, 10, {"max_tokens": 1000}, 54),
        (COMPLETIONS, 60, {"max_tokens": 10}, 4),
        (CHAT, 63, {}, 1),
        (CHAT, 40, {}, 24),
        (CHAT, 40, {"max_tokens": None, "max_completion_tokens": None}, 24),
        (CHAT, 40, {"max_tokens": 1}, 1),
        (CHAT, 40, {"max_completion_tokens": 3}, 3),
        (CHAT, 40, {"max_completion_tokens": 3, "max_tokens": 3}, 3),
        (CHAT, 40, {"max_tokens": 1000}, 24),
    ],
)
def test_e_length_limits(service: Any, route: str, prompt_tokens: int, limit: Any, completion_tokens: int) -> None:
    status, body = asked(service, route, prompt_tokens, **limit)
    assert status == 200
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize(
    ("route", "limit", "param"),
    [
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, {"max_completion_tokens": 3, "max_tokens": 4}, "max_completion_tokens"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": -5}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
    ],
)
def test_e_length_limits_refused(service: Any, route: str, limit: dict[str, int], param: str) -> None:
    status, body = asked(service, route, 40, **limit)
    assert (status, body["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("route", "prompt_tokens", "limit", "completion_tokens"),
    [
        (CHAT, 30, {}, 20),
        (CHAT, 30, {"max_tokens": None}, 20),
        (CHAT, 60, {}, 4),
        (CHAT, 30, {"max_tokens": 25}, 25),
        (CHAT, 30, {"max_completion_tokens": 1}, 1),
        (COMPLETIONS, 30, {}, 16),
    ],
)
def test_a_default_limit_holds_for_chat_requests_without_their_own(
    service: Any, route: str, prompt_tokens: int, limit: Any, completion_tokens: int
) -> None:
    state = service.app.state
    state.settings = state.settings.model_copy(update={"default_max_tokens": 20})
    status, body = asked(service, route, prompt_tokens, **limit)
    assert (status, body["usage"]["completion_tokens"]) == (200, completion_tokens)


@pytest.mark.parametrize("prompt", ["", [""], [], [[]]])
def test_e_length_limits_empty_prompt(service: Any, prompt: Any) -> None:
    with service.http() as http:
        answer = http.post(COMPLETIONS, json={"model": "base", "prompt": prompt})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_e_length_limits_echo_of_a_prompt_that_is_longer_than_the_context(service: Any) -> None:
    status, body = asked(service, COMPLETIONS, 100, echo=True, max_tokens=0)
    assert (status, body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]) == (200, 0, "length")


@pytest.mark.parametrize("stream", [False, True])
def test_e_length_limits_echo(service: Any, stream: bool) -> None:
    client = service.openai()
    for limit, text in ((0, "xyz"), (2, "xyzMM")):
        service.say("MM")
        answer = client.completions.create(model="base", prompt="xyz", echo=True, max_tokens=limit, stream=stream)
        texts = [chunk.choices[0].text for chunk in answer] if stream else [answer.choices[0].text]
        assert "".join(texts) == text
        assert stream or (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (limit, "length")
    assert len(service.engine.submitted) == 1
