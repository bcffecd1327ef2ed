"""Checkpoints that are named ``org/name``: a snapshot of the model hub's repository, in the hub's own cache."""

import re
from pathlib import Path

from httpx import HTTPError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from deltaserve.delta_store.errors import CheckpointError

WEIGHTS = ("*.safetensors", "*.bin")
OTHER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")


def snapshot(name: str) -> Path:
    """The folder of ``org/name``, downloaded at first use; ``.bin`` files only where there are no safetensors.

    Raises CheckpointError where ``name`` is neither a folder nor a repository that can be reached.
    """
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None:
        raise CheckpointError(f"{name!r} is no folder or file here, and no name of the form org/name")
    try:
        for weights in WEIGHTS:
            # A repository's subfolders hold the same weights in other formats.
            folder = Path(snapshot_download(name, allow_patterns=[*OTHER_FILES, weights], ignore_patterns="*/*"))
            if any(folder.glob(weights)):
                break
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name!r} is no folder or file here, and the model hub did not give it: {reason}"
        ) from error
