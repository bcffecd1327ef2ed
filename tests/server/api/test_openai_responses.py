"""``/v1/responses`` by the openai client: whole and streamed, and what is refused by name."""

from typing import Any

import openai
import pytest
from scripted_engine import Script, ids
from tiny_models import tiny_tokenizer


def test_text_in_text_out(service: Any) -> None:
    service.say("hello")
    answer = service.openai().responses.create(model="base", input="hi", instructions="be kind", temperature=0)
    assert (answer.output_text, answer.status, answer.model) == ("hello", "completed", "base")
    assert answer.output[0].id.startswith("msg_")
    (sent,) = service.engine.submitted
    assert tiny_tokenizer(258).decode(sent.prompt) == "system: be kind\nuser: hi\nassistant: "
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(sent.prompt), 5)
    assert answer.usage.total_tokens == len(sent.prompt) + 5
    assert (sent.sampling.temperature, answer.instructions, answer.store) == (0, "be kind", False)


def test_a_conversation_goes_on_with_the_answers_own_items(service: Any) -> None:
    service.say("yes")
    client = service.openai()
    first = client.responses.create(model="base", input=[{"role": "user", "content": "a"}])
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"role": "user", "content": "b"},
    ]
    assert client.responses.create(model="base", input=turns).output_text == "yes"
    prompt = tiny_tokenizer(258).decode(service.engine.submitted[1].prompt)
    assert prompt == "user: a\nassistant: yes\nuser: b\nassistant: "


def test_an_answer_that_is_cut_off_says_so(service: Any) -> None:
    service.say("hello")
    for stream in (False, True):
        asked = {"model": "base", "input": "hi", "max_output_tokens": 2}
        if stream:
            with service.openai().responses.stream(**asked) as events:
                answer = next(event for event in events if event.type == "response.incomplete").response
        else:
            answer = service.openai().responses.create(**asked)
        assert (answer.output_text, answer.status) == ("he", "incomplete")
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert answer.output[0].status == "incomplete"


def test_streamed_events_are_openais_and_join_to_the_whole(service: Any) -> None:
    service.say("héllo")
    with service.openai().responses.stream(model="base", input="hi") as stream:
        events = list(stream)
        assert stream.get_final_response().output_text == "héllo"
    kinds = [event.type for event in events]
    assert kinds[:4] == [f"response.{k}" for k in ("created", "in_progress", "output_item.added", "content_part.added")]
    assert kinds[-4:] == [
        f"response.{k}" for k in ("output_text.done", "content_part.done", "output_item.done", "completed")
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == "héllo"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with service.http() as http:
        lines = http.post("/v1/responses", json={"model": "base", "input": "hi", "stream": True}).text.splitlines()
    assert lines[0] == "event: response.created"


def test_a_failure_before_the_first_token_is_a_status_and_later_an_event(service: Any) -> None:
    tokens = ids(service.engine.tokenizer, "hello")
    for after, failure in ((0, openai.InternalServerError), (2, openai.APIError)):
        service.engine.script = lambda *_, after=after: Script(tokens, fail_after=after)
        with pytest.raises(failure, match="out of memory"):
            list(service.openai().responses.create(model="base", input="hi", stream=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("store", True),
        ("background", True),
        ("tools", [{"type": "web_search"}]),
        ("reasoning", {"effort": "high"}),
        ("text", {"format": {"type": "json_object"}}),
        ("truncation", "auto"),
        ("conversation", "conv_1"),
        ("max_output_tokens", 0),
        ("input", []),
    ],
)
def test_what_is_not_there_is_refused_by_name(service: Any, field: str, value: Any) -> None:
    body = {"model": "base", "input": "hi", field: value}
    with service.http() as http:
        refused = http.post("/v1/responses", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
    assert service.engine.submitted == []


def test_other_refusals_are_those_of_chat_and_name_its_fields(service: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        service.openai().responses.create(model="nobody", input="hi")
    with pytest.raises(openai.BadRequestError, match="context") as refused:
        service.openai().responses.create(model="base", input="x" * 100)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")
