"""Text to run models on: tokenised conversations or windows of prose, with the positions that count."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from deltaserve.delta_store.errors import CheckpointError, OptionError

WINDOW_TOKENS = 256
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of one text; the tokens from ``start`` on are predicted and scored, those before are only read.

    With a ``label`` the text as a whole is classified, and that is the number of its class.
    """

    ids: tuple[int, ...]
    start: int = 1
    label: int | None = None


class Line(BaseModel):
    """A line of a ``.jsonl`` file: a prompt and its answer, messages of which the last is the answer, or a text and
    the number of its class."""

    prompt: str | None = None
    answer: str | None = None
    messages: list[dict[str, str]] | None = None
    text: str | None = None
    label: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _has_an_answer(self) -> "Line":
        if self.text is not None and self.label is not None:
            return self
        if (self.messages is None) == (self.prompt is None or self.answer is None):
            raise ValueError('needs either "prompt" and "answer" or "messages", or for an encoder "text" and "label"')
        if self.messages is not None and (len(self.messages) < 2 or "content" not in self.messages[-1]):
            raise ValueError('"messages" needs a question and, last, its answer')
        return self

    def split(self) -> tuple[list[dict[str, str]], str]:
        """The messages that are read and the answer that is scored."""
        if self.messages is not None:
            return self.messages[:-1], self.messages[-1]["content"]
        return [{"role": "user", "content": self.prompt or ""}], self.answer or ""


def read_samples(path: Path, tokenizer: Any, limit: int) -> list[Sample]:
    """The samples of a file: one a line for ``.jsonl``, else windows of prose; at most ``limit`` scored tokens.

    Raises OptionError for a file that is missing, empty or malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"Cannot read the text file {path}: {error}") from error
    if path.suffix == ".jsonl":
        samples = [_of_line(path, i, line, tokenizer) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        samples = _first(samples, limit)
    else:
        samples = windows(text, tokenizer, limit)
    if not samples:
        raise OptionError(
            f"{path} holds no text; it needs a few thousand words, or a few hundred conversations in .jsonl"
        )
    return samples


def windows(text: str, tokenizer: Any, limit: int) -> list[Sample]:
    """Windows of ``WINDOW_TOKENS`` spread evenly over the text, together at most ``limit`` tokens."""
    ids = tokenizer(text, verbose=False).input_ids
    count = max(1, min(len(ids), limit) // WINDOW_TOKENS)
    stride = max(WINDOW_TOKENS, len(ids) // count)
    cut = [tuple(ids[i * stride : i * stride + WINDOW_TOKENS]) for i in range(count)]
    return [Sample(window) for window in cut if len(window) > 1]


def _of_line(path: Path, number: int, line: str, tokenizer: Any) -> Sample:
    try:
        content = Line.model_validate_json(line)
    except ValidationError as error:
        raise OptionError(f"{path}, line {number}: {error.errors()[0]['msg']}") from error
    if content.text is not None and content.label is not None:
        return Sample(tuple(tokenizer(content.text, truncation=True).input_ids), label=content.label)
    question, answer = content.split()
    if tokenizer.chat_template is None:
        raise OptionError(f"{path} holds conversations, but the base has no chat template; give plain text instead")
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Sample(tuple(prompt_ids + answer_ids + end), max(1, len(prompt_ids)))


def _first(samples: list[Sample], limit: int) -> list[Sample]:
    """As many samples from the front as hold ``limit`` scored tokens together, and at least one."""
    scored = 0
    for count, sample in enumerate(samples):
        scored += len(sample.ids) - sample.start
        if scored > limit:
            return samples[: max(1, count)]
    return samples


def tokenizer_of(*folders: Path) -> Any | None:
    """The tokenizer of the first of these folders that has one. Raises CheckpointError where it cannot be loaded."""
    from transformers import AutoTokenizer

    folder = next((f for f in folders if any((f / name).is_file() for name in TOKENIZER_FILES)), None)
    if folder is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} has no tokenizer that can be loaded: {reason}") from error
