"""langchain-openai, unmodified, on the demo's real base over real HTTP: text, streams, schemas and tools."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from running_server import running

DEMO = Path(__file__).parents[3] / "deploy" / "demo"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: Any) -> Iterator[ChatOpenAI]:
    command = [sys.executable, str(DEMO / "base.py")]
    base = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    with running(Path(base), tmp_path_factory.mktemp("store"), served_name="base") as server:
        yield ChatOpenAI(
            model="base", base_url=f"{server.url}/v1", api_key="none", temperature=0, max_tokens=60, max_retries=0
        )


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Paris", "Rome"]
    celsius: int


def test_an_answer_and_the_same_streamed(chat: ChatOpenAI) -> None:
    question = "What is the capital of France?"
    answer = chat.invoke(question)
    assert "Paris" in str(answer.content)
    assert answer.response_metadata["finish_reason"] == "stop"
    assert "".join(str(chunk.content) for chunk in chat.stream(question)) == answer.content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: ChatOpenAI, method: Literal["json_schema", "function_calling"]) -> None:
    found = chat.with_structured_output(Weather, method=method).invoke("It is 20 degrees in Paris today.")
    assert isinstance(found, Weather)


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_tool_and_its_result(chat: ChatOpenAI, stream: bool) -> None:
    tooled = chat.bind_tools([Weather], tool_choice="required", parallel_tool_calls=False)
    question = "It is 20 degrees in Paris today."
    if stream:
        first, *rest = tooled.stream(question)
        answer: Any = first
        for chunk in rest:
            answer += chunk
    else:
        answer = tooled.invoke(question)
    (call,) = answer.tool_calls
    assert call["name"] == "Weather"
    Weather(**call["args"])
    result = {"role": "tool", "tool_call_id": call["id"], "content": "noted"}
    assert chat.invoke([{"role": "user", "content": question}, answer, result]).content
