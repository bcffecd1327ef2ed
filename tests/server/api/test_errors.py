"""Every failure has OpenAI's shape, and its own row in the table."""

from typing import Any

import pytest

from deltaserve.delta_store import errors
from deltaserve.server.api.errors import TABLE, described


def test_every_error_has_a_row() -> None:
    known = {cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.DeltaServeError)}
    assert known == set(TABLE)


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
def test_every_error_is_described(kind: type[errors.DeltaServeError]) -> None:
    error = kind("what was wrong", "0" * 64) if kind is errors.ProfileMissing else kind("what was wrong")
    status, body = described(error)
    assert 400 <= status < 600
    assert (body["error"]["message"], set(body["error"])) == ("what was wrong", {"message", "type", "param", "code"})
    assert (body["error"]["type"] == "server_error") == (status >= 500)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/v1/nothing", 404, "unknown_url"), ("GET", "/v1/chat/completions", 405, "method_not_allowed")],
)
def test_routes_that_are_not_there(service: Any, method: str, path: str, status: int, code: str) -> None:
    with service.http() as http:
        answer = http.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert f"{method} {path}" in answer.json()["error"]["message"]


def test_ready_tells_the_truth_about_the_generation_thread(service: Any) -> None:
    with service.http() as http:
        assert http.get("/ready").status_code == 200
        service.engine.failure = "the model step failed: out of memory"
        answer = http.get("/ready")
        assert http.get("/health").status_code == 200
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_down")
    assert "out of memory" in answer.json()["error"]["message"]


def test_the_schema_document_says_how_every_route_fails(service: Any) -> None:
    with service.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    for path, methods in paths.items():
        for method, operation in methods.items():
            answers = operation["responses"]
            shape = answers["4XX"]["content"]["application/json"]["schema"]["$ref"]
            assert shape == "#/components/schemas/ErrorAnswer", (method, path)
            assert "422" not in answers, (method, path)
    assert {"/v1/models", "/v1/models/{name}", "/v1/chat/completions", "/v1/completions", "/health"} <= set(paths)
