"""Failures before, at and after the first token (case E-breaks-midstream)."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from scripted_engine import Script, ids

from deltaserve.delta_store.errors import CorruptArtifact, EngineDown, GenerationFailed, QueueFull

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def scripts(service: Any, **broken: Any) -> None:
    """Requests for ``broken`` fail as told; all others say ``abcdefgh``, slowly."""
    tokens = ids(service.engine.tokenizer, "abcdefgh")

    def script(prompt: Any, version: Any, sampling: Any) -> Script:
        return Script(tokens, every_s=0.02, **(broken if version else {}))

    service.engine.script = script
    service.register("broken")


def test_e_breaks_midstream(service: Any) -> None:
    scripts(service, fail_after=5)

    def read(model: str) -> tuple[str, str | None]:
        text, failure = "", None
        try:
            for chunk in service.openai().chat.completions.create(model=model, stream=True, **ASK):
                text += chunk.choices[0].delta.content or ""
                assert chunk.choices[0].finish_reason != "stop" or model == "base"
        except openai.APIError as error:
            failure = error.message
        return text, failure

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(read, ["base", "broken", "base"]))
    assert results == [
        ("abcdefgh", None),
        ("abcde", "The model step failed: out of memory"),
        ("abcdefgh", None),
    ]
    service.wait_until(lambda: service.engine.live == 0)
    service.wait_until(lambda: service.ended() == {"error": 1, "stop": 2})


def test_e_breaks_midstream_one_error_event_is_the_last(service: Any) -> None:
    scripts(service, fail_after=5)
    with service.http() as http:
        answer = http.post("/v1/chat/completions", json={"model": "broken", "stream": True, **ASK})
    events = answer.text.strip().split("\n\n")
    assert answer.status_code == 200
    assert json.loads(events[-1].removeprefix("data: ")) == {
        "error": {
            "message": "The model step failed: out of memory",
            "type": "server_error",
            "param": None,
            "code": "generation_failed",
        }
    }
    assert all("error" not in json.loads(event.removeprefix("data: ")) for event in events[:-1])
    assert "[DONE]" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_e_breaks_midstream_before_the_first_token(service: Any, stream: bool) -> None:
    scripts(service, fail_after=0)
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        service.openai().chat.completions.create(model="broken", stream=stream, **ASK)


def test_e_breaks_midstream_not_streaming(service: Any) -> None:
    scripts(service, fail_after=5)
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        service.openai().chat.completions.create(model="broken", **ASK)


def test_e_breaks_midstream_deleted_while_it_runs(service: Any) -> None:
    scripts(service)
    digest = service.register("broken")
    chunks = iter(service.openai().completions.create(model="broken", prompt="hi", stream=True))
    text = next(chunks).choices[0].text
    with service.http() as http:
        http.delete("/v1/variants/broken")
    assert service.app.state.blobs.path(digest).exists()
    assert text + "".join(chunk.choices[0].text for chunk in chunks) == "abcdefgh"


def test_what_nobody_foresaw_is_told_without_its_text(service: Any) -> None:
    scripts(service, fail_after=2, failure=KeyError("/home/secret"))
    with pytest.raises(openai.APIError) as failure:
        list(service.openai().chat.completions.create(model="broken", stream=True, **ASK))
    assert failure.value.code == "internal_error"
    with pytest.raises(openai.InternalServerError) as whole:
        service.openai().chat.completions.create(model="broken", **ASK)
    assert "secret" not in failure.value.message + whole.value.message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (EngineDown("The generation thread has died; it is being restarted"), 503, "engine_down"),
        (QueueFull("288 requests run or wait; try again later"), 429, "queue_full"),
        (CorruptArtifact("bytes 3 to 9 are damaged"), 500, "generation_failed"),
        (GenerationFailed("no"), 500, "generation_failed"),
        (RuntimeError("/home/secret"), 500, "internal_error"),
    ],
)
def test_a_refusal_is_an_http_status(service: Any, stream: bool, refusal: Exception, status: int, code: str) -> None:
    service.engine.refusal = refusal
    with service.http() as http:
        answer = http.post("/v1/chat/completions", json={"model": "base", "stream": stream, **ASK})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert "secret" not in answer.text
