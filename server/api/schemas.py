"""What a client may send to the OpenAI routes."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from deltaserve.delta_store.errors import RequestRefused
from deltaserve.server.api.fields import MAX_CHOICES, Between, Biases, Body, Prompts, Stops, Text, only
from deltaserve.server.api.structured import ResponseFormat, StructuredOutputs
from deltaserve.server.api.tools import Named, Tool, ToolCall, ToolChoice, Tools, calls_grammar, check_tools
from deltaserve.server.engine.grammar import Grammar, Grammars

INT64 = 2**63
ANY_COUNT = 2**53


class StreamOptions(Body):
    """``stream_options``."""

    include_usage: bool = False
    include_obfuscation: Annotated[Any, only(False)] = None


class Generation(Body):
    """The fields that both generating routes share; the last six are vLLM's extensions."""

    model: Text
    n: Annotated[int, Between(1, MAX_CHOICES)] = 1
    stop: Stops = Field(default_factory=list)
    seed: Annotated[int, Between(-INT64, INT64 - 1)] | None = None
    temperature: Annotated[float, Between(0, 2)] = 1.0
    top_p: Annotated[float, Between(0, 1, above=True)] = 1.0
    presence_penalty: Annotated[float, Between(-2, 2)] = 0.0
    frequency_penalty: Annotated[float, Between(-2, 2)] = 0.0
    logit_bias: Biases = Field(default_factory=dict)
    max_tokens: Annotated[int, Between(0, ANY_COUNT)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Text | None = Field(None, description="One user gets one version of a split variant")

    top_k: Annotated[int, Between(-1, ANY_COUNT)] = 0
    min_p: Annotated[float, Between(0, 1)] = 0.0
    repetition_penalty: Annotated[float, Between(0.1, 10)] = 1.0
    min_tokens: Annotated[int, Between(0, ANY_COUNT)] = 0
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None

    def grammar(self, grammars: Grammars) -> Grammar | None:
        """What the answer must follow. Compiling takes a while. Raises RequestRefused that names field and fault."""
        return None if self.structured_outputs is None else self.structured_outputs.grammar(grammars)

    @property
    def token_limit(self) -> int | None:
        """The most tokens that an answer may have; None if the client does not say."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of its token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestRefused("'stream_options' is only allowed with 'stream': true", "stream_options")
        return self


class TextPart(Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: Text


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Content = Annotated[list[TextPart], BeforeValidator(_parts, json_schema_input_type=str | list[TextPart])]


class Message(Body):
    """One turn of a conversation. An answer's message can be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Content | None, Field(validate_default=True)] = None
    name: Text | None = None
    refusal: Annotated[Any, only("")] = None
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_call_id: Text | None = None
    function_call: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    audio: Annotated[Any, only()] = None

    @property
    def text(self) -> str:
        """The parts of the content, one after the other."""
        return "".join(part.text for part in self.content or [])

    @field_validator("content")
    @classmethod
    def _only_the_assistant_may_be_silent(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and info.data.get("role") != "assistant":
            raise PydanticCustomError("missing", "is required")
        return content

    @model_validator(mode="after")
    def _calls_and_results_where_they_belong(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise RequestRefused("'tool_calls' belongs to messages of the assistant", "messages")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise RequestRefused("'tool_call_id' belongs to messages with role 'tool', and to each of them", "messages")
        return self


class ChatRequest(Generation):
    """The body of ``POST /v1/chat/completions``."""

    prompt_field: ClassVar[str] = "messages"
    continues: ClassVar[bool] = False
    """Whether an answer goes on after the prompt's text."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Between(0, ANY_COUNT)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Between(0, 20)] | None = None

    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none")] = None
    modalities: Annotated[Any, only(["text"])] = None
    audio: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only("none")] = None
    verbosity: Annotated[Any, only("medium")] = None
    web_search_options: Annotated[Any, only()] = None
    store: Annotated[Any, only(False)] = None
    metadata: Annotated[Any, only({})] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    prompt_cache_key: Annotated[Any, only()] = None
    prompt_cache_retention: Annotated[Any, only()] = None
    safety_identifier: Annotated[Any, only()] = None

    @property
    def token_limit(self) -> int | None:
        """The most tokens that an answer may have, under either name; None if the client does not say."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> str | Named:
        """``tool_choice``, ``auto`` where the client does not say."""
        return "auto" if self.tool_choice is None else self.tool_choice

    def grammar(self, grammars: Grammars) -> Grammar | None:
        """As in Generation."""
        if self.callable_tools:
            return calls_grammar(grammars, self.tools, self.must_call, self.parallel_tool_calls)
        if self.response_format is not None and self.structured_outputs is None:
            return self.response_format.grammar(grammars)
        return super().grammar(grammars)

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to name beside each one; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _one_form_of_answer(self) -> Self:
        check_tools(self.tools, self.tool_choice)
        formatted = self.response_format is not None and self.response_format.type != "text"
        forms = {"tools": bool(self.callable_tools), "response_format": formatted}
        forms["structured_outputs"] = self.structured_outputs is not None
        if len(given := [name for name, is_given in forms.items() if is_given]) > 1:
            raise RequestRefused(f"{' and '.join(map(repr, given))} are not supported together; send one", given[-1])
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestRefused("'top_logprobs' is only allowed with 'logprobs': true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestRefused(
                f"'max_tokens' is {self.max_tokens} and 'max_completion_tokens' is {self.max_completion_tokens}; "
                "send one of them",
                "max_completion_tokens",
            )
        if self.token_limit == 0:
            field = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
            raise RequestRefused(f"{field!r} must be a whole number of at least 1; got 0", field)
        return self


class CompletionRequest(Generation):
    """The body of ``POST /v1/completions``."""

    prompt_field: ClassVar[str] = "prompt"
    continues: ClassVar[bool] = True

    prompt: Prompts
    max_tokens: Annotated[int, Between(0, ANY_COUNT)] = 16
    logprobs: Annotated[int, Between(0, 5)] | None = None
    echo: bool = False

    best_of: Annotated[int, Between(1, MAX_CHOICES)] | None = None
    suffix: Annotated[Any, only("")] = None

    @property
    def alternatives(self) -> int | None:
        """As in ChatRequest."""
        return self.logprobs

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise RequestRefused(f"'best_of' is not supported; leave it out, or set it to 'n', {self.n}", "best_of")
        if self.n * len(self.prompt) > MAX_CHOICES:
            raise RequestRefused(
                f"'n' times the number of prompts must be at most {MAX_CHOICES}; got {self.n * len(self.prompt)}", "n"
            )
        if self.echo and self.logprobs is not None:
            raise RequestRefused("'logprobs' of an echoed prompt are not supported; leave one of them out", "logprobs")
        if self.max_tokens == 0 and not self.echo:
            raise RequestRefused("'max_tokens' may be 0 only with 'echo': true; ask for at least 1", "max_tokens")
        return self
