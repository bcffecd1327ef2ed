"""``response_format`` and ``structured_outputs`` over HTTP: a tiny random model that cannot but obey."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel
from running_server import Running, artifact, running
from tiny_models import save, tiny_llama

VOCABULARY = 260
CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["sad", "glad"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["mood", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Running]:
    folder: Path = save(tiny_llama(vocab=VOCABULARY), tmp_path_factory.mktemp("base") / "base", vocab=VOCABULARY)
    with running(folder, tmp_path_factory.mktemp("store")) as server:
        file = artifact(folder, folder.parent / "noisy.safetensors", seed=3)
        server.http.put("/v1/variants/noisy", content=file.read_bytes()).raise_for_status()
        yield server


@pytest.fixture
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def json_schema(schema: Any, **more: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


@pytest.mark.parametrize("model", ["base", "noisy"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_its_schema(client: OpenAI, model: str, stream: bool) -> None:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, response_format=json_schema(SCHEMA, strict=True), seed=1, n=3, stream=stream
    )
    texts, reasons = [""] * 3, [None] * 3
    for part in answer if stream else [answer]:  # type: ignore[union-attr,attr-defined,list-item]
        for choice in part.choices:
            texts[choice.index] += (choice.delta if stream else choice.message).content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert reasons == ["stop"] * 3
    for text in texts:
        found = json.loads(text)
        assert set(found) == {"mood", "age"}
        assert found["mood"] in ("sad", "glad")
        assert 0 <= found["age"] <= 99


class Answer(BaseModel):
    mood: Literal["sad", "glad"]
    likes_it: bool


def test_the_client_s_own_parsing(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(model="noisy", messages=MESSAGES, response_format=Answer, max_tokens=150)
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_any_json_object(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="base", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=100, seed=3
    )
    text = answer.choices[0].message.content
    assert text is not None
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"choice": ["yes", "no", 'per"haps']}, 'yes|no|per"haps'),
        ({"grammar": 'start: "<" /[a-z]{4}/ ">"'}, "<[a-z]{4}>"),
        ({"grammar": 'root ::= "<" [a-z] ">"'}, "<[a-z]>"),
        ({"json": {"type": "integer", "minimum": 7, "maximum": 8}}, "[78]"),
    ],
)
def test_structured_outputs_on_both_routes(client: OpenAI, outputs: Any, pattern: str) -> None:
    extra: Any = {"structured_outputs": outputs}
    chat = client.chat.completions.create(model="noisy", messages=MESSAGES, extra_body=extra, max_tokens=50)
    completion = client.completions.create(model="base", prompt="hi", extra_body=extra, max_tokens=50)
    for text, reason in (
        (chat.choices[0].message.content or "", chat.choices[0].finish_reason),
        (completion.choices[0].text, completion.choices[0].finish_reason),
    ):
        assert re.fullmatch(pattern, text)
        assert reason == "stop"


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": json_schema({"type": "objekt"})}, "response_format.json_schema.schema", "objekt"),
    ({"response_format": json_schema({"uniqueItems": True})}, "response_format.json_schema.schema", "uniqueItems"),
    ({"response_format": json_schema(5)}, "response_format.json_schema.schema", "dictionary"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
    (
        {"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}},
        "response_format",
        "type",
    ),
    ({"response_format": {"type": "grammar"}}, "response_format.type", "json_object"),
    ({"response_format": json_schema({}) | {"mood": 1}}, "response_format.mood", "not a field"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "unclosed group"),
    ({"structured_outputs": {"grammar": "start: foo"}}, "structured_outputs.grammar", "foo"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not a field"),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "not supported together",
    ),
    ({"guided_json": {}}, "guided_json", "not a field"),
]


@pytest.mark.parametrize(("fields", "param", "fault"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_form_is_refused_by_name(
    client: OpenAI, fields: dict[str, Any], param: str, fault: str, stream: bool
) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(model="base", messages=MESSAGES, stream=stream, extra_body=fields)
    assert refused.value.param == param
    assert fault in refused.value.message


def test_stop_and_length_still_count(client: OpenAI) -> None:
    extra: Any = {"structured_outputs": {"regex": "ab*c"}}
    ask: Any = {"model": "base", "prompt": "hi", "extra_body": extra, "logit_bias": {"67": 100}}
    cut = client.completions.create(**ask, max_tokens=5).choices[0]
    assert (cut.text, cut.finish_reason) == ("abbbb", "length")
    stopped = client.completions.create(**ask, max_tokens=20, stop="bbb").choices[0]
    assert (stopped.text, stopped.finish_reason) == ("a", "stop")
