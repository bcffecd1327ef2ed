"""Kinds of request fields: numbers with a range, fields that are not there yet, text, stops, biases, prompts."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_CHOICES = 128
MAX_INPUTS = 2048
MAX_STOPS = 4
MAX_STOP_LENGTH = 1000
MAX_BIAS = 100.0
SHOWN = 60


class Body(BaseModel):
    """A JSON object of a request: exact types, no unknown fields, and null means absent for every field that it has."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


def shown(value: Any) -> str:
    """A value for an error message, cut to a line."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


@dataclass(frozen=True, slots=True)
class Between:
    """Marks an int or float field that must lie from ``low`` to ``high``; ``above``: ``low`` itself is excluded."""

    low: int | float
    high: int | float
    above: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        kinds = (int,) if source is int else (int, float)

        def check(value: Any) -> Any:
            # No float function here: an int of 400 digits is valid JSON and overflows them. NaN is in no range.
            fits = type(value) in kinds and self.low <= value <= self.high
            if not fits or (self.above and value == self.low):
                raise PydanticCustomError("out_of_range", f"must be {self.range(source)}; got {shown(value)}")
            return source(value)

        return core_schema.no_info_before_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        least = "exclusiveMinimum" if self.above else "minimum"
        return handler(schema) | {least: self.low, "maximum": self.high}

    def range(self, kind: type) -> str:
        """The allowed values, in words."""
        number = "a whole number" if kind is int else "a number"
        bounds = f"above {self.low}, at most {self.high}" if self.above else f"from {self.low} to {self.high}"
        return f"{number} {bounds}"


class only:  # noqa: N801  (reads as a word where fields are declared)
    """Marks a field that OpenAI has and deltaserve has not: just the values that ask for nothing are accepted."""

    def __init__(self, *accepted: Any) -> None:
        self.accepted = accepted

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(value: Any) -> Any:
            if not any(type(value) is type(known) and value == known for known in self.accepted):
                choices = "".join(f", or set it to {known!r}" for known in self.accepted)
                raise PydanticCustomError(
                    "not_there_yet",
                    f"is not supported; leave it out{choices}; got {shown(value)}",
                )
            return value

        return core_schema.no_info_after_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(schema) | {"enum": [*self.accepted, None], "description": "Not supported"}


def _text(value: str) -> str:
    if not _is_text(value):
        raise PydanticCustomError("text", "must be text; it holds half of a surrogate pair, which UTF-8 cannot write")
    return value


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError("stop", f"must hold at most {MAX_STOPS} strings; got {len(stops)}")
    if not all(0 < len(stop) <= MAX_STOP_LENGTH and _is_text(stop) for stop in stops):
        raise PydanticCustomError("stop", f"must hold strings of 1 to {MAX_STOP_LENGTH} characters, none of them empty")
    return stops


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or not all(_is_id(key) for key in value):
        raise PydanticCustomError("logit_bias", "must be an object whose keys are token ids, written as whole numbers")
    for bias in value.values():
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise PydanticCustomError(
                "logit_bias",
                f"must hold numbers from {-MAX_BIAS:g} to {MAX_BIAS:g}; got {shown(bias)}",
            )
    return {int(key): float(bias) for key, bias in value.items()}


def _is_id(key: Any) -> bool:
    return isinstance(key, str) and key.isascii() and key.removeprefix("-").isdigit() and len(key) < SHOWN


def _prompts(value: Any) -> list[str | list[int]]:
    return _texts(value, MAX_CHOICES, "prompts")


def _inputs(value: Any) -> list[str | list[int]]:
    inputs = _texts(value, MAX_INPUTS, "texts")
    if "" in inputs:
        raise PydanticCustomError("input", "must not hold an empty string")
    return inputs


def _texts(value: Any, most: int, what: str) -> list[str | list[int]]:
    texts = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(texts, list) or not all((isinstance(t, str) and _is_text(t)) or _is_ids(t) for t in texts):
        raise PydanticCustomError(
            "texts", "must be a string, a list of strings, a list of token ids, or a list of those"
        )
    if not 1 <= len(texts) <= most:
        raise PydanticCustomError("texts", f"must hold from 1 to {most} {what}; got {len(texts)}")
    return texts


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON can spell half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


Text = Annotated[str, AfterValidator(_text)]
Stops = Annotated[list[str], PlainValidator(_stops, json_schema_input_type=str | list[str])]
Biases = Annotated[dict[int, float], PlainValidator(_biases, json_schema_input_type=dict[str, float])]
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Inputs = Annotated[
    list[str | list[int]],
    PlainValidator(_inputs, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
