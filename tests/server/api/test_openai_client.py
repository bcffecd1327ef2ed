"""The unmodified openai client: sync, async, streaming, n, seeds, logprobs; and the variants' own templates."""

import asyncio
import json
import math
from typing import Any

import pytest
from openai import AsyncOpenAI
from scripted_engine import Script, Token, ids, scripted_tokenizer

MESSAGES: Any = [{"role": "user", "content": "hi"}]


def test_a_whole_answer_and_a_stream(service: Any) -> None:
    service.say("hello")
    client = service.openai()
    whole = client.chat.completions.create(model="base", messages=MESSAGES)
    assert (whole.object, whole.model, whole.choices[0].message.role) == ("chat.completion", "base", "assistant")
    chunks = list(client.chat.completions.create(model="base", messages=MESSAGES, stream=True))
    assert {(chunk.id, chunk.created, chunk.object) for chunk in chunks} == {
        (chunks[0].id, chunks[0].created, "chat.completion.chunk")
    }
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_include_usage_ends_the_stream_with_the_counts(service: Any) -> None:
    service.say("hello")
    options = {"include_usage": True}
    *chunks, last = service.openai().chat.completions.create(
        model="base", messages=MESSAGES, stream=True, stream_options=options
    )
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, last.usage.completion_tokens, last.usage.prompt_tokens) == ([], 5, 20)


def test_the_events_of_a_stream_are_what_the_document_says(service: Any) -> None:
    service.say("ab")
    with service.http() as http:
        answer = http.post("/v1/chat/completions", json={"model": "base", "messages": MESSAGES, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = answer.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert [(choice["delta"], choice["finish_reason"]) for choice in choices] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "a"}, None),
        ({"content": "b"}, None),
        ({}, "stop"),
    ]


def test_many_streams_at_once_with_the_async_client(service: Any) -> None:
    service.engine.script = lambda prompt, *_: Script(prompt[6:8], every_s=0.001)

    async def one(client: AsyncOpenAI, number: int) -> str:
        messages: Any = [{"role": "user", "content": f"{number:02}"}]
        stream = await client.chat.completions.create(model="base", messages=messages, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, number) for number in range(20)))

    assert asyncio.run(all_of_them()) == [f"{number:02}" for number in range(20)]


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices_have_seeds_of_their_own_that_repeat(service: Any, stream: bool) -> None:
    tokens = ids(service.engine.tokenizer, "abcdefghijklmnopqrstuvwxyz")
    service.engine.script = lambda _, __, sampling: Script([tokens[(sampling.seed or 0) % 26]])

    def ask(seed: int, n: int) -> list[str]:
        answer = service.openai().chat.completions.create(
            model="base", messages=MESSAGES, n=n, seed=seed, stream=stream
        )
        if not stream:
            return [choice.message.content for choice in answer.choices]
        texts = [""] * n
        for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        return texts

    assert ask(5, 4) == ask(5, 4)
    assert ask(5, 4)[0] == ask(5, 1)[0] == "f"
    seeds = [submitted.sampling.seed for submitted in service.engine.submitted[:4]]
    assert len(set(seeds)) == 4
    service.openai().chat.completions.create(model="base", messages=MESSAGES, n=2)
    assert [submitted.sampling.seed for submitted in service.engine.submitted[-2:]] == [None, None]


def test_several_prompts_of_either_kind(service: Any) -> None:
    service.engine.script = lambda prompt, *_: Script(prompt)
    tokens = ids(service.engine.tokenizer, "xyz")
    client = service.openai()
    for prompts, texts in (
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        (tokens, ["xyz"]),
        ([tokens, tokens[:1]], ["xyz", "x"]),
    ):
        answer = client.completions.create(model="base", prompt=prompts, n=2)
        assert [(choice.index, choice.text) for choice in answer.choices] == [
            (index, text) for index, text in enumerate(text for text in texts for _ in range(2))
        ]
        assert answer.usage.prompt_tokens == sum(map(len, texts))
        assert answer.usage.completion_tokens == 2 * sum(map(len, texts))


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(service: Any, stream: bool) -> None:
    tokens = ids(service.engine.tokenizer, "a😀")
    service.engine.script = lambda *_: Script(
        [Token(tokens[0], -0.25, ((tokens[0], -0.25), (0, -math.inf)))] + [Token(t, 1e-7, ()) for t in tokens[1:]]
    )
    answer = service.openai().chat.completions.create(
        model="base", messages=MESSAGES, logprobs=True, top_logprobs=2, stream=stream
    )
    chunks = list(answer) if stream else [answer]
    content = [entry for chunk in chunks if (found := chunk.choices[0].logprobs) for entry in found.content]
    assert [entry.bytes for entry in content] == [[97], *([byte] for byte in "😀".encode())]
    assert [entry.token for entry in content] == ["a", "\\xf0", "\\x9f", "\\x98", "\\x80"]
    assert [entry.logprob for entry in content] == [-0.25, 0, 0, 0, 0]
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("a", -0.25), ("<|end|>", -9999.0)]


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(service: Any, stream: bool) -> None:
    tokens = ids(service.engine.tokenizer, "aéb")
    service.engine.script = lambda *_: Script([Token(t, -0.5, ((t - 1, -0.1), (t - 2, -math.inf))) for t in tokens])
    answer = service.openai().completions.create(model="base", prompt="hi", logprobs=2, stream=stream)
    chunks = [chunk.choices[0].logprobs for chunk in answer] if stream else [answer.choices[0].logprobs]
    assert [token for chunk in chunks for token in chunk.tokens] == ["a", "bytes:\\xc3", "bytes:\\xa9", "b"]
    assert [offset for chunk in chunks for offset in chunk.text_offset] == [0, 1, 1, 2]
    assert [value for chunk in chunks for value in chunk.token_logprobs] == [-0.5] * 4
    assert all(
        len(top) == 3 and top[t] == -0.5 for c in chunks for t, top in zip(c.tokens, c.top_logprobs, strict=True)
    )


def test_no_logprobs_unless_asked(service: Any) -> None:
    service.say("a")
    client = service.openai()
    assert client.chat.completions.create(model="base", messages=MESSAGES).choices[0].logprobs is None
    assert client.completions.create(model="base", prompt="hi").choices[0].logprobs is None


def test_the_conversation_goes_through_the_chat_template(service: Any) -> None:
    service.say("ok")
    first = service.openai().chat.completions.create(
        model="base",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
        max_tokens=5,
    )
    again: Any = [first.choices[0].message.model_dump(), {"role": "user", "content": "c"}]
    service.openai().chat.completions.create(model="base", messages=again, max_tokens=5)
    texts = [service.engine.tokenizer.decode(submitted.prompt) for submitted in service.engine.submitted]
    assert texts == ["system: be brief\nuser: ab\nassistant: ", "assistant: ok\nuser: c\nassistant: "]


def test_a_variant_answers_with_its_own_template_and_tokenizer(service: Any) -> None:
    template = b"{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    grown = scripted_tokenizer()
    grown.add_tokens(["ARR"])
    service.register("templated", {"chat_template.jinja": template})
    service.register("grown", {"tokenizer.json": grown.backend_tokenizer.to_str().encode()})
    service.register("refuses", {"chat_template.jinja": b"{{ raise_exception('roles must alternate') }}"})
    service.register("broken", {"tokenizer.json": b"{"})
    service.say("ok")
    client = service.openai()
    client.chat.completions.create(model="templated", messages=MESSAGES)
    client.chat.completions.create(model="grown", messages=[{"role": "user", "content": "ARR"}])
    assert service.engine.tokenizer.decode(service.engine.submitted[0].prompt) == "[hi]"
    assert len(grown) - 1 in service.engine.submitted[1].prompt
    with service.http() as http:
        refused, broken = (
            http.post("/v1/chat/completions", json={"model": name, "messages": MESSAGES})
            for name in ("refuses", "broken")
        )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
    assert "roles must alternate" in refused.json()["error"]["message"]
    assert (broken.status_code, broken.json()["error"]["code"]) == (500, "generation_failed")
