"""The tokenizer and chat template of a version: its own where its artifact brings them, else the base's."""

import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.errors import RequestRefused, UnsupportedArtifact
from deltaserve.delta_store.variant_files import VARIANT_FILES
from deltaserve.server.api.detokenise import TokenBytes
from deltaserve.server.api.tools_prompt import in_words, knows_tools
from deltaserve.server.engine.grammar import Grammars

KEPT = 64
TEMPLATE_FILE = "chat_template.jinja"
FILES = frozenset(VARIANT_FILES) - {"generation_config.json"}


class Tokeniser:
    """One tokenizer, with its whole texts and whole conversations turned into ids. Safe to use from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer file may bring a truncation that would cut long prompts without a word.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.token_bytes = TokenBytes(self._backend, frozenset(tokenizer.all_special_ids))
        self.vocabulary = len(tokenizer)
        self.grammars = Grammars(tokenizer)

    def ids(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``; ``special`` adds what the tokenizer puts around a text."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=special).ids
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """What ``ids`` stand for, without special tokens."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def conversation(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids of a conversation that the assistant is to answer, with the functions that it may call.

        Raises RequestRefused if there is no chat template, or if the template refuses these messages.
        """
        if not self._tokenizer.chat_template:
            raise RequestRefused("This model has no chat template; use /v1/completions", "messages")
        turns, shown = [dict(message) for message in messages], [dict(tool) for tool in tools]
        if not knows_tools(self._tokenizer.chat_template):
            turns, shown = in_words(turns, shown), []
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tools=shown or None, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise RequestRefused(f"The model's chat template refuses these messages: {error}", "messages") from error
        return self.ids(text, special=False)


class Tokenisers:
    """The tokenisers of the versions used last, by digest."""

    def __init__(self, base: Any) -> None:
        self._base_tokenizer = base
        self.base = Tokeniser(base)
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Tokeniser] = OrderedDict()

    def of(self, digest: str, artifact: Path) -> Tokeniser:
        """The tokeniser of the version with this digest. Blocks while it is read. Raises ArtifactError."""
        with self._lock:
            if digest not in self._kept:
                self._kept[digest] = self._read(artifact)
            self._kept.move_to_end(digest)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[digest]

    def _read(self, artifact: Path) -> Tokeniser:
        opened = open_artifact(artifact)
        files = {name: data for name, data in opened.files.items() if name in FILES}
        return Tokeniser(overlaid(self._base_tokenizer, files)) if files else self.base


def overlaid(base: Any, files: Mapping[str, bytes]) -> Any:
    """The base's tokenizer with some of its files replaced.

    Raises UnsupportedArtifact if these files make no tokenizer.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base.save_pretrained(folder)
        try:
            if _has_template(files.get("tokenizer_config.json", b"{}")):
                (folder / TEMPLATE_FILE).unlink(missing_ok=True)
            for file, data in files.items():
                (folder / file).write_bytes(data)
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnsupportedArtifact(f"The variant's tokenizer files cannot be used: {error}") from error


def _has_template(config: bytes) -> bool:
    return "chat_template" in json.loads(config)
