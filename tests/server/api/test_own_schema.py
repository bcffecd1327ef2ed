"""Requests that schemathesis makes up from our own OpenAPI: no 500, and no answer that the schema does not tell of."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from running_server import Running, artifact, running
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

EXAMPLES = 8
"""Requests to each route."""

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def asked(base, tmp_path_factory) -> Iterator[Running]:
    """Keys are off: one that is made up would lock the others out. Answers are short, whatever is asked for."""
    folder = tmp_path_factory.mktemp("schema")
    artifact(base, folder / "artifact")
    with running(base, folder / "store", keys="off", context=24, upload_idle_seconds=1.0) as server:
        yield server


def test_no_500_and_no_undocumented_answer(asked: Running) -> None:
    schema = schemathesis.openapi.from_dict(asked.app.openapi())
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 25
    statuses: set[int] = set()
    said = []
    for operation in operations:
        asked.http.put("/v1/variants/v", content=(asked.store.parent / "artifact").read_bytes()).raise_for_status()
        try:
            statuses |= ask(operation, asked.url)
        except (FailureGroup, Failure) as failure:
            said.append(f"{operation.label}: {failure}")
    assert not said, "\n\n".join(said)
    assert {200, 201, 202, 400, 404} <= statuses, "requests that work were among them, and such that do not"


def ask(operation: APIOperation, url: str) -> set[int]:
    """Send requests that fit the operation's schema, some about what is there, and others that do not fit.

    Returns the statuses of the answers; raises what was wrong.
    """
    statuses: set[int] = set()
    fitting, misfitting = (operation.as_strategy(mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE))

    @seed(1)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
        report_multiple_bugs=False,
    )
    @given(case=fitting.map(about_what_is_there) | fitting | misfitting)
    def answers(case: Case) -> None:
        statuses.add(case.call_and_validate(base_url=url, checks=CHECKS, timeout=20).status_code)

    answers()
    return statuses


def about_what_is_there(case: Case) -> Case:
    """The request with a name that the server knows."""
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "base"
    if "name" in case.path_parameters:
        case.path_parameters["name"] = "v"
    return case
