"""Tools: how they reach the model, and calls in OpenAI's shape, whole and streamed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from running_server import Running, running
from tiny_models import save, tiny_llama

VOCABULARY = 260
MESSAGES: Any = [{"role": "user", "content": "hi"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": CITY}},
    {"type": "function", "function": {"name": "stop"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
KNOWS_TOOLS = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}{{ m.role }}={{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.city }}{% endfor %};{% endfor %}"
)


def gathered(chunks: Any) -> tuple[str, list[dict[str, Any]], str | None]:
    """Text, calls and finish reason of a stream."""
    text, calls, reason = "", [], None
    for chunk in chunks:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            if call.id:
                assert (call.index, call.type) == (len(calls), "function")
                calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
            calls[call.index]["arguments"] += call.function.arguments
    return text, calls, reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "text", "names"),
    [
        (CALL, "", ["weather"]),
        (f"Let me see.\n{CALL}\n{CALL}", "Let me see.", ["weather", "weather"]),
        ("No tool <needed>.", "No tool <needed>.", []),
    ],
)
def test_calls_in_an_answer(service: Any, stream: bool, said: str, text: str, names: list[str]) -> None:
    service.engine.context_length = 512
    service.say(said)
    service.register("tooled", {"chat_template.jinja": KNOWS_TOOLS.encode()})
    answer = service.openai().chat.completions.create(
        model="tooled", messages=MESSAGES, tools=TOOLS, stream=stream, logprobs=True
    )
    if stream:
        found, calls, reason = gathered(answer)
    else:
        message, reason = answer.choices[0].message, answer.choices[0].finish_reason
        assert message.content == (text if text or not names else None)
        found = message.content or ""
        calls = [{"id": c.id} | c.function.model_dump() for c in message.tool_calls or []]
        assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    assert (found, [call["name"] for call in calls]) == (text, names)
    assert all(json.loads(call["arguments"]) == {"city": "Rome"} for call in calls)
    assert reason == ("tool_calls" if names else "stop")
    assert len({call["id"] for call in calls}) == len(names)


def test_a_template_that_knows_tools_gets_them_and_calls_and_results(service: Any) -> None:
    service.say("ok")
    service.register("tooled", {"chat_template.jinja": KNOWS_TOOLS.encode()})
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "4C"},
    ]
    service.openai().chat.completions.create(model="tooled", messages=messages, tools=TOOLS[:1])
    prompt = service.engine.tokenizer.decode(service.engine.submitted[0].prompt)
    assert prompt == "[weather]user=hi;assistant=<tool_call>Oslo;tool=4C;"


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tool_choice": "required"}, "tool_choice", "'tools'"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "'required'"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sing"}}},
        "tool_choice",
        "weather, stop",
    ),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice", "must be"),
    ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].type", "'function'"),
    ({"tools": TOOLS + TOOLS}, "tools", "twice"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
    (
        {"tools": [TOOLS[0], {"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}]},
        "tools[1].function.parameters",
        "objekt",
    ),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format", "not supported together"),
    ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls", "boolean"),
]


@pytest.mark.parametrize(("fields", "param", "fault"), BAD)
def test_tools_that_cannot_be_used_are_refused_by_name(
    client: OpenAI, fields: dict[str, Any], param: str, fault: str
) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(model="base", messages=MESSAGES, extra_body=fields)
    assert (refused.value.param, fault in refused.value.message) == (param, True), refused.value.message


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Running]:
    """A random model, that calls a tool only because it must."""
    model = tiny_llama(vocab=VOCABULARY, context=1024)
    folder: Path = save(model, tmp_path_factory.mktemp("base") / "base", vocab=VOCABULARY)
    with running(folder, tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_has_valid_arguments(client: OpenAI, choice: Any, stream: bool) -> None:
    ask: Any = {"model": "base", "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "max_tokens": 300}
    answer: Any = client.chat.completions.create(**ask, parallel_tool_calls=False, seed=5, stream=stream)
    if stream:
        _, calls, reason = gathered(answer)
        (name, arguments) = (calls[0]["name"], calls[0]["arguments"])
    else:
        (called,), reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
        (name, arguments) = (called.function.name, called.function.arguments)
    if choice == "required":
        assert name in ("weather", "stop")
        assert reason in ("tool_calls", "length")
    else:
        assert name == "weather"
        assert reason in ("stop", "length")
    if reason != "length":
        assert isinstance(json.loads(arguments), dict)
        assert name == "stop" or json.loads(arguments)["city"] in ("Rome", "Oslo")


def test_none_calls_nothing_and_the_tools_are_not_shown(client: OpenAI) -> None:
    ask: Any = {"model": "base", "messages": MESSAGES, "max_tokens": 5, "temperature": 0}
    without = client.chat.completions.create(**ask)
    none = client.chat.completions.create(**ask, tools=TOOLS, tool_choice="none")
    assert none.choices[0].message.content == without.choices[0].message.content
    assert none.choices[0].message.tool_calls is None
    assert none.usage is not None
    assert without.usage is not None
    assert none.usage.prompt_tokens == without.usage.prompt_tokens
