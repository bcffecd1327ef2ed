"""Numbers outside their range, and fields that are not there (case E-parameters-out-of-bounds)."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from scripted_engine import Script, ids

from deltaserve.server.api.bounded import MAX_BODY_BYTES
from deltaserve.server.api.schemas import ChatRequest, CompletionRequest

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ASK: dict[str, dict[str, Any]] = {
    CHAT: {"model": "base", "messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"model": "base", "prompt": "hi"},
}

BOTH = [
    ("logit_bias", '{"300": 1}', "0 to 299"),
    ("logit_bias", '{"-1": 1}', "0 to 299"),
    ("logit_bias", '{"x": 1}', "token ids"),
    ("logit_bias", '{"5": 1e9}', "-100 to 100"),
    ("logit_bias", '{"5": NaN}', "-100 to 100"),
    ("logit_bias", '{"5": "1"}', "-100 to 100"),
    ("logit_bias", "[5]", "token ids"),
    ("top_k", "0.01", "-1 to"),
    ("top_k", "301", "-1 to 300"),
    ("top_k", "-2", "-1 to"),
    ("max_tokens", "-5", "from 0 to"),
    ("max_tokens", "1.5", "from 0 to"),
    ("n", "0", "1 to 128"),
    ("n", "100000", "1 to 128"),
    ("n", "true", "1 to 128"),
    ("seed", str(2**70), str(2**63 - 1)),
    ("seed", "1.0", str(2**63 - 1)),
    ("temperature", "NaN", "0 to 2"),
    ("temperature", "Infinity", "0 to 2"),
    ("temperature", "-0.1", "0 to 2"),
    ("temperature", "2.1", "0 to 2"),
    ("temperature", '"1"', "0 to 2"),
    ("temperature", "1" * 400, "0 to 2"),
    ("temperature", "1e999", "0 to 2"),
    ("top_p", "-" + "9" * 400, "above 0, at most 1"),
    ("top_p", "0", "above 0, at most 1"),
    ("top_p", "1.01", "above 0, at most 1"),
    ("min_p", "-Infinity", "0 to 1"),
    ("presence_penalty", "2.5", "-2 to 2"),
    ("frequency_penalty", "-2.5", "-2 to 2"),
    ("repetition_penalty", "0", "0.1 to 10"),
    ("min_tokens", "-1", "from 0 to"),
    ("stream_options", '{"include_usage": true}', "'stream': true"),
    ("model", '"\\ud800"', "surrogate"),
    ("user", '"\\udfff"', "surrogate"),
    ("user", "5", "'user' should be a valid string"),
]
ONE: list[tuple[str, str, str, str]] = [
    (CHAT, "top_logprobs", "1000000", "0 to 20"),
    (CHAT, "top_logprobs", "5", "'logprobs': true"),
    (CHAT, "messages", "[]", "at least 1 item"),
    (COMPLETIONS, "logprobs", "-1", "0 to 5"),
    (COMPLETIONS, "logprobs", "6", "0 to 5"),
    (COMPLETIONS, "prompt", "[1, 2, 300]", "0 to 299"),
    (COMPLETIONS, "prompt", "[[1], [-1]]", "0 to 299"),
    (COMPLETIONS, "prompt", "[1, 2.5]", "token ids"),
    (COMPLETIONS, "prompt", "[true]", "token ids"),
    (COMPLETIONS, "prompt", '["a", [1, "b"]]', "token ids"),
    (COMPLETIONS, "prompt", '"\\ud800"', "token ids"),
    (COMPLETIONS, "prompt", json.dumps(["a"] * 129), "1 to 128"),
    (COMPLETIONS, "best_of", "2", "'n'"),
    (COMPLETIONS, "logprobs", '1, "echo": true', "echoed"),
]
CASES = [(route, *case) for route in (CHAT, COMPLETIONS) for case in BOTH] + ONE


def test_e_parameters_out_of_bounds(service: Any) -> None:
    """Each bad value in turn, next to a stream that must not notice."""
    tokens = ids(service.engine.tokenizer, "abcdefgh" * 6)
    service.engine.script = lambda *_: Script(tokens, every_s=0.02)
    running = service.openai().completions.create(model="base", prompt="hi", max_tokens=48, stream=True)
    with ThreadPoolExecutor(1) as pool, service.http() as http:
        text = pool.submit(lambda: "".join(chunk.choices[0].text for chunk in running))
        for route, field, value, allowed in CASES:
            body = json.dumps(ASK[route])[:-1] + f', "{field}": {value}}}'
            answer = http.post(route, content=body, headers={"Content-Type": "application/json"})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, field), (body, error)
            assert allowed in error["message"], (body, error)
        assert text.result() == "abcdefgh" * 6
        service.say("ok")
        assert http.post(CHAT, json=ASK[CHAT]).json()["choices"][0]["message"]["content"] == "ok"
    assert len(service.engine.submitted) == 2


NOT_THERE = [
    (CHAT, "functions", [{"name": "f"}]),
    (CHAT, "audio", {"voice": "alloy", "format": "wav"}),
    (CHAT, "modalities", ["text", "audio"]),
    (CHAT, "prediction", {"type": "content", "content": "x"}),
    (CHAT, "web_search_options", {}),
    (CHAT, "store", True),
    (CHAT, "metadata", {"a": "b"}),
    (CHAT, "reasoning_effort", "high"),
    (CHAT, "service_tier", "priority"),
    (COMPLETIONS, "suffix", "end"),
]


@pytest.mark.parametrize(("route", "field", "value"), NOT_THERE, ids=[case[1] for case in NOT_THERE])
def test_a_field_that_is_not_there_yet_is_refused_by_name(service: Any, route: str, field: str, value: Any) -> None:
    with service.http() as http:
        answer = http.post(route, json=ASK[route] | {field: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, field, "unsupported_parameter")
    assert f"'{field}' is not supported" in error["message"]


@pytest.mark.parametrize("route", ASK)
@pytest.mark.parametrize("value", [1, None])
def test_an_unknown_field_is_refused_by_name(service: Any, route: str, value: Any) -> None:
    with service.http() as http:
        answer = http.post(route, json=ASK[route] | {"temprature": value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "temprature")
    assert answer.json()["error"]["code"] == "unknown_parameter"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ({"role": "tool", "content": "x"}, "messages"),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, "messages"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
        ),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls[0].function"),
        ({"role": "user", "content": "x", "mood": "sad"}, "messages[0].mood"),
        ("hi", "messages[0]"),
    ],
)
def test_a_message_that_cannot_be_used_is_refused_by_name(service: Any, message: Any, param: str) -> None:
    with service.http() as http:
        answer = http.post(CHAT, json={"model": "base", "messages": [message]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ('{"role": "user", "content": "\\ud800"}', "messages[0].content[0].text"),
        ('{"role": "user", "content": [{"type": "text", "text": "a\\udfff"}]}', "messages[0].content[0].text"),
        ('{"role": "user", "content": "x", "name": "\\ud800"}', "messages[0].name"),
    ],
)
def test_half_a_surrogate_pair_is_refused_by_name(service: Any, message: str, param: str) -> None:
    body = f'{{"model": "base", "messages": [{message}]}}'
    with service.http() as http:
        answer = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_values_that_ask_for_nothing_are_accepted(service: Any) -> None:
    nothing = {field: None for field in ChatRequest.model_fields if field not in ("model", "messages")}
    defaults = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "user": "me"}
    service.say("ok")
    with service.http() as http:
        for fields in (nothing, defaults):
            assert http.post(CHAT, json=ASK[CHAT] | fields).status_code == 200
        nothing = {field: None for field in CompletionRequest.model_fields if field not in ("model", "prompt")}
        assert http.post(COMPLETIONS, json=ASK[COMPLETIONS] | nothing).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b"{}" * 2, b'{"\\ud800": 1}']
)
@pytest.mark.parametrize("route", ASK)
def test_a_body_that_is_no_object_is_a_400(service: Any, route: str, body: bytes) -> None:
    with service.http() as http:
        answer = http.post(route, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("route", ASK)
@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_a_413(service: Any, route: str, announced: bool) -> None:
    body = json.dumps(ASK[route] | {"user": "x" * MAX_BODY_BYTES}).encode()
    pieces = (body[start : start + 2**20] for start in range(0, len(body), 2**20))
    with service.http() as http:
        answer = http.post(route, content=body if announced else pieces, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert str(MAX_BODY_BYTES) in answer.json()["error"]["message"]


def test_the_values_reach_the_engine_as_they_were_sent(service: Any) -> None:
    sent = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.2,
        "seed": -3,
        "min_tokens": 2,
        "ignore_eos": True,
        "max_tokens": 5,
    }
    with service.http() as http:
        http.post(CHAT, json=ASK[CHAT] | sent | {"logit_bias": {"5": -100}, "logprobs": True, "top_logprobs": 3})
    sampling = service.engine.submitted[0].sampling
    assert {name: getattr(sampling, name) for name in sent} == sent
    assert (sampling.logit_bias, sampling.logprobs) == ({5: -100.0}, 3)
