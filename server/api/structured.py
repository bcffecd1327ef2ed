"""What an answer must look like: ``response_format``, and vLLM's ``structured_outputs``."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from deltaserve.delta_store.errors import RequestRefused
from deltaserve.server.api.fields import Body, Text
from deltaserve.server.engine import grammar_text
from deltaserve.server.engine.grammar import Grammar, Grammars

Identifier = Annotated[str, StringConstraints(pattern="^[a-zA-Z0-9_-]{1,64}$")]
MAX_ALTERNATIVES = 1000


class JsonSchema(Body):
    """``response_format.json_schema``. The answer follows the schema whether ``strict`` or not."""

    name: Identifier
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool = False


class ResponseFormat(Body):
    """``response_format``: any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise RequestRefused(
                '\'response_format.json_schema\' belongs to "type": "json_schema", and only to that', "response_format"
            )
        return self

    def grammar(self, grammars: Grammars) -> Grammar | None:
        """What the answer must follow. Raises RequestRefused."""
        if self.type == "json_object":
            return grammars.compiled(grammar_text.of_schema({"type": "object"}), "response_format")
        if self.json_schema is None:
            return None
        field = "response_format.json_schema.schema"
        return grammars.compiled(grammar_text.of_schema(self.json_schema.schema_), field)


class StructuredOutputs(Body):
    """vLLM's ``structured_outputs``: exactly one of its fields."""

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    json_object: bool = False
    regex: Text | None = None
    choice: Annotated[list[Text] | None, Field(min_length=1, max_length=MAX_ALTERNATIVES)] = None
    grammar_: Annotated[Text | None, Field(alias="grammar")] = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [self.json_, self.json_object or None, self.regex, self.choice, self.grammar_]
        if sum(value is not None for value in given) != 1:
            raise RequestRefused(
                "'structured_outputs' must have exactly one of json, json_object, regex, choice, grammar",
                "structured_outputs",
            )
        return self

    def grammar(self, grammars: Grammars) -> Grammar:
        """What the answer must follow. Raises RequestRefused."""
        if self.regex is not None:
            return grammars.compiled(grammar_text.of_regex(self.regex), "structured_outputs.regex")
        if self.choice is not None:
            return grammars.compiled(grammar_text.of_choices(self.choice), "structured_outputs.choice")
        if self.grammar_ is not None:
            field = "structured_outputs.grammar"
            return grammars.compiled(grammar_text.of_grammar(self.grammar_, field), field)
        schema = {"type": "object"} if self.json_ is None else self.json_
        return grammars.compiled(grammar_text.of_schema(schema), "structured_outputs.json")
