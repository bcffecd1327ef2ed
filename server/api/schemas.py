"""What a client may send to the OpenAI routes."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from deltaserve.delta_store.errors import RequestRefused
from deltaserve.server.api.fields import MAX_CHOICES, Between, Biases, Body, Prompts, Stops, Text, only

INT64 = 2**63
ANY_COUNT = 2**53


class StreamOptions(Body):
    """``stream_options``."""

    include_usage: bool = False
    include_obfuscation: Annotated[Any, only(False)] = None


class Generation(Body):
    """The fields that both generating routes share; the last five are vLLM's extensions."""

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
    user: Text | None = Field(None, description="Accepted; deltaserve does nothing with it")

    top_k: Annotated[int, Between(-1, ANY_COUNT)] = 0
    min_p: Annotated[float, Between(0, 1)] = 0.0
    repetition_penalty: Annotated[float, Between(0.1, 10)] = 1.0
    min_tokens: Annotated[int, Between(0, ANY_COUNT)] = 0
    ignore_eos: bool = False

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

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Content | None, Field(validate_default=True)] = None
    name: Text | None = None
    refusal: Annotated[Any, only("")] = None
    tool_calls: Annotated[Any, only([])] = None
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


class ChatRequest(Generation):
    """The body of ``POST /v1/chat/completions``."""

    prompt_field: ClassVar[str] = "messages"
    continues: ClassVar[bool] = False
    """Whether an answer goes on after the prompt's text."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Between(0, ANY_COUNT)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Between(0, 20)] | None = None

    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none")] = None
    parallel_tool_calls: Annotated[Any, only(True, False)] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none")] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
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
    def alternatives(self) -> int | None:
        """How many likely tokens to name beside each one; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

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
