"""The files beside the weights that a variant brings along: tokenizer, chat template, generation settings."""

import json
from pathlib import Path

from deltaserve.delta_store.errors import CheckpointError

VARIANT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "generation_config.json",
)

WITHOUT_MEANING = ("transformers_version", "_from_model_config", "name_or_path", "_name_or_path")
"""Keys that say who wrote a file, or where: no difference, and no business of whoever gets the artifact."""

OF_TRAINING = (
    "backend",
    "is_local",
    "local_files_only",
    "max_length",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "padding",
    "padding_side",
    "stride",
    "truncation",
    "truncation_side",
    "truncation_strategy",
)
"""What a tokenizer was told about cutting and padding when it was last used, or where it was read: saved with it, while
serving cuts and pads by rules of its own."""


def differing_files(base: Path, fine_tuned: Path) -> dict[str, bytes]:
    """Files of the fine-tune that the base lacks or has otherwise; JSON is compared by what it says.

    A tokenizer is compared by what it makes of a text, so one that was only used in training is the base's.
    """
    found = {}
    for name in VARIANT_FILES:
        if (fine_tuned / name).is_file() and _meaning(base / name) != _meaning(fine_tuned / name):
            found[name] = _clean(fine_tuned / name)
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """All such files of a checkpoint folder."""
    return {name: (folder / name).read_bytes() for name in VARIANT_FILES if (folder / name).is_file()}


def _meaning(path: Path) -> object:
    if not path.is_file():
        return None
    content = path.read_bytes()
    if path.suffix != ".json":
        return content
    data = _parsed(path, content)
    if isinstance(data, dict) and path.name.startswith("tokenizer"):
        return {key: value for key, value in data.items() if key not in OF_TRAINING}
    return data


def _clean(path: Path) -> bytes:
    """The file as it is, unless it is JSON that holds keys without meaning."""
    content = path.read_bytes()
    if path.suffix != ".json" or not any(key.encode() in content for key in WITHOUT_MEANING):
        return content
    return json.dumps(_parsed(path, content), indent=2, ensure_ascii=False).encode()


def _parsed(path: Path, content: bytes) -> object:
    try:
        data = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is no valid JSON ({error}); save the tokenizer again") from error
    if isinstance(data, dict):
        return {key: value for key, value in data.items() if key not in WITHOUT_MEANING}
    return data
