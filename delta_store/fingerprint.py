"""A base's fingerprint: the same for the same parameters, however they are split, named on disk or rounded up."""

import hashlib
import logging
import os
from pathlib import Path

from deltaserve.delta_store.cache_folder import cache_folder, identity
from deltaserve.delta_store.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

CHUNK = 16 << 20
"""As many values of a tensor are turned into float32 at a time."""


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hex SHA-256 over names, shapes and float32 values of all parameters.

    Reading everything takes a second for 1 GB; the result is kept under the identity of the checkpoint's files.
    """
    files = (*checkpoint.files, checkpoint.folder / "config.json")
    kept = cache_folder() / "fingerprints" / identity(files)
    if kept.is_file():
        return kept.read_text()
    result = _compute(checkpoint)
    _keep(kept, result)
    return result


def _compute(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256()
    for name in checkpoint.names:
        shape = checkpoint.shape(name)
        digest.update(f"{name}\0{','.join(map(str, shape))}\0".encode())
        values = checkpoint.read(name).flatten()
        for start in range(0, len(values), CHUNK):
            digest.update(values[start : start + CHUNK].float().numpy().data)
    return digest.hexdigest()


def _keep(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        logger.info("The fingerprint is not kept, so it is computed again next time: %s", error)
