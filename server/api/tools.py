"""Tools as a client sends them, and what an answer may then look like."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

from deltaserve.delta_store.errors import RequestRefused
from deltaserve.server.api.fields import Body, Text, shown
from deltaserve.server.api.structured import Identifier
from deltaserve.server.engine import grammar_text
from deltaserve.server.engine.grammar import Grammar, Grammars

OPENING, CLOSING = "<tool_call>\n", "}\n</tool_call>"
"""Around ``{"name": ..., "arguments": <JSON>``: how many models were taught to write a call."""
MAX_TOOLS = 128


class Function(Body):
    """A function that the model may call. Arguments follow ``parameters`` whether ``strict`` or not."""

    name: Identifier
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """A JSON schema of the arguments; they are an object, also where ``parameters`` does not say so."""
        given = self.parameters or {}
        return given if {"type", "$ref", "anyOf", "allOf", "oneOf"} & given.keys() else {"type": "object", **given}


class Tool(Body):
    """One entry of ``tools``."""

    type: Literal["function"]
    function: Function


@dataclass(frozen=True, slots=True)
class Named:
    """``tool_choice`` that names the function to be called."""

    name: str


def _tool_choice(value: Any) -> str | Named:
    if value in ("none", "auto", "required"):
        return str(value)
    match value:
        case {"type": "function", "function": {"name": str(name), **more}, **others} if not more and not others:
            return Named(name)
    kinds = "'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}"
    raise PydanticCustomError("tool_choice", "{said}", {"said": f"must be {kinds}; got {shown(value)}"})


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
ToolChoice = Annotated[str | Named, PlainValidator(_tool_choice, json_schema_input_type=str | dict[str, Any])]


class CalledFunction(Body):
    """A call's function; ``arguments`` is JSON as text."""

    name: Text
    arguments: Text


class ToolCall(Body):
    """A call in an earlier answer, sent back."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction

    @property
    def as_turn(self) -> dict[str, Any]:
        """As chat templates read it: the arguments as an object."""
        function = {"name": self.function.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}

    @property
    def arguments(self) -> Any:
        """Raises RequestRefused if they are not JSON."""
        try:
            return json.loads(self.function.arguments or "{}")
        except ValueError as error:
            raise RequestRefused(f"The arguments of tool call {self.id!r} are not JSON: {error}", "messages") from error


def check_tools(tools: Sequence[Tool], choice: str | Named | None) -> None:
    """Raise RequestRefused where the two do not fit together."""
    names = [tool.function.name for tool in tools]
    if twice := {name for name in names if names.count(name) > 1}:
        raise RequestRefused(f"'tools' has the function {min(twice)!r} twice; rename one", "tools")
    if not names and choice not in (None, "none"):
        raise RequestRefused("'tool_choice' is only allowed with 'tools'", "tool_choice")
    if isinstance(choice, Named) and choice.name not in names:
        raise RequestRefused(
            f"'tool_choice' names the function {choice.name!r}; 'tools' has {', '.join(names)}", "tool_choice"
        )


def calls_grammar(grammars: Grammars, tools: Sequence[Tool], choice: str | Named, several: bool) -> Grammar:
    """What an answer with ``tools`` must follow. Raises RequestRefused that names the tool at fault."""
    functions = {}
    for index, tool in enumerate(tools):
        if not isinstance(choice, Named) or tool.function.name == choice.name:
            schema = tool.function.schema_of_arguments
            grammars.compiled(grammar_text.of_schema(schema), f"tools[{index}].function.parameters")
            functions[tool.function.name] = schema
    several = several and not isinstance(choice, Named)
    text = grammar_text.of_calls(functions, OPENING, CLOSING, text=choice == "auto", several=several)
    return grammars.compiled(text, "tools")
