"""Names that the server knows and names that it does not (case E-unknown-model)."""

from typing import Any

import openai
import pytest

PROMPTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", PROMPTS)
@pytest.mark.parametrize("model", ["pirat", "", " ", "bäse", "../etc/passwd", "a" * 500])
def test_e_unknown_model(service: Any, route: str, stream: bool, model: str) -> None:
    service.register("pirate")
    with service.http() as http:
        answer = http.post(route, json={"model": model, "stream": stream, **PROMPTS[route]})
    error = answer.json()["error"]
    assert answer.status_code == 404
    assert error["message"]
    assert error == error | {"type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    assert service.engine.submitted == []


@pytest.mark.parametrize("route", PROMPTS)
@pytest.mark.parametrize("model", [{"model": 5}, {"model": None}, {"model": ["base"]}, {}])
def test_e_unknown_model_wrong_type_or_missing(service: Any, route: str, model: dict[str, Any]) -> None:
    with service.http() as http:
        answer = http.post(route, json=PROMPTS[route] | model)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model"


def test_e_unknown_model_deleted_a_moment_ago(service: Any) -> None:
    service.say("yes")
    service.register("pirate")
    client, ask = service.openai(), PROMPTS["/v1/chat/completions"]
    assert client.chat.completions.create(model="pirate", **ask).choices[0].message.content == "yes"
    with service.http() as http:
        assert http.delete("/v1/variants/pirate").status_code == 200
    with pytest.raises(openai.NotFoundError) as failure:
        client.chat.completions.create(model="pirate", stream=True, **ask)
    assert failure.value.code == "model_not_found"


def test_models_lists_the_base_and_every_usable_variant(service: Any) -> None:
    digests = {name: service.register(name) for name in ("team/pirate", "kjv")}
    service.register("of-another-base", base="0" * 64)
    service.app.state.blobs.path(service.register("file-is-gone")).unlink()
    client = service.openai()
    models = client.models.list().data
    assert [(model.id, model.parent, model.root) for model in models] == [
        ("base", None, "base"),
        ("kjv", "base", "base"),
        ("team/pirate", "base", "base"),
    ]
    found = client.models.retrieve("team/pirate")
    assert (found.id, found.version, found.owned_by) == ("team/pirate", digests["team/pirate"], "deltaserve")
    assert client.models.retrieve("base").id == "base"
    for name in ("nobody", "of-another-base", "file-is-gone", "team"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)


def test_a_variant_of_another_base_is_not_answered_by_this_one(service: Any) -> None:
    service.register("foreign", base="0" * 64)
    with pytest.raises(openai.NotFoundError):
        service.openai().completions.create(model="foreign", prompt="hi")


@pytest.mark.parametrize("stream", [False, True])
def test_the_header_names_the_version_that_answered(service: Any, stream: bool) -> None:
    digest = service.register("pirate")
    service.say("yes")
    for model, version in (("pirate", digest), ("base", service.engine.fingerprint)):
        with service.http() as http:
            answer = http.post("/v1/completions", json={"model": model, "prompt": "hi", "stream": stream})
        assert answer.headers["x-deltaserve-version"] == version
        assert f'"model":"{model}"' in answer.text
    assert [s.version and s.version.digest for s in service.engine.submitted] == [digest, None]
