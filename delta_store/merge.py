"""Base and artifact put together again: the variant's tensors, and an ordinary checkpoint made of them."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from deltaserve.delta_store.bits import same_bits
from deltaserve.delta_store.checkpoint import Checkpoint, open_checkpoint
from deltaserve.delta_store.codec.artifact import Artifact, open_artifact
from deltaserve.delta_store.codec.specs import XorSpec
from deltaserve.delta_store.delta import is_whole
from deltaserve.delta_store.errors import BaseMismatch, OptionError, UnsupportedArtifact
from deltaserve.delta_store.fingerprint import fingerprint
from deltaserve.delta_store.heads import CONFIG, variant_architecture
from deltaserve.delta_store.plain_model import variant_config
from deltaserve.delta_store.profile import Profile, profile_of
from deltaserve.delta_store.variant_files import files_of
from deltaserve.kernels.reference import unpack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written: ``shards`` files of ``size_bytes`` together, with ``tensors`` tensors."""

    folder: Path
    tensors: int
    shards: int
    size_bytes: int


def merge(
    base: str | Path,
    artifact: str | Path,
    out: Path,
    dtype: str | None = None,
    profile_file: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Merged:
    """Write the variant into the new folder ``out`` as a checkpoint that transformers loads, with its tokenizer.

    ``dtype`` is a key of ``DTYPES``; by default the tensors are as the fine-tune had them, which a lossless artifact
    gives back bit for bit. ``profile_file`` is the activation profile that the artifact names, if it is neither beside
    it nor in the cache. Takes the memory of one shard (2 GiB). Raises OptionError, BaseMismatch, ProfileMissing, and
    what opening the two raises; the folder is there whole or not at all.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"Unknown dtype {dtype!r}; known are: {', '.join(DTYPES)}")
    if out.exists():
        raise OptionError(f"{out} exists already; choose a new folder, or remove it first")
    checkpoint, opened = open_checkpoint(base), open_artifact(artifact)
    check_base(checkpoint, opened)
    profile = profile_of(opened) if profile_file is None else Profile.open(profile_file)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        tensors = variant_tensors(checkpoint, opened, profile, DTYPES[dtype] if dtype else None, progress)
        count, shards = _write_shards(partial, tensors)
        _write_files(partial, checkpoint, opened, DTYPES[dtype] if dtype else variant_dtype(checkpoint, opened))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return Merged(out, count, shards, size)


def check_base(base: Checkpoint, artifact: Artifact) -> None:
    """Raises BaseMismatch unless the artifact was made for this base."""
    if (found := fingerprint(base)) != artifact.manifest.base:
        made_from = artifact.manifest.provenance.get("base", "another model")
        raise BaseMismatch(
            f"{artifact.path} was made for a base with fingerprint {artifact.manifest.base[:16]}... ({made_from}), "
            f"but {base.folder} has {found[:16]}...; give the base that it was compressed against"
        )


def variant_tensors(
    base: Checkpoint,
    artifact: Artifact,
    profile: Profile | None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the variant, by its own names, in ``dtype``, or by default in the fine-tune's own."""
    names = variant_names(base, artifact)
    for done, (name, ours) in enumerate(names.items()):
        progress(done, len(names))
        yield name, variant_tensor(base, artifact, ours, profile, dtype)


def variant_tensor(
    base: Checkpoint, artifact: Artifact, name: str, profile: Profile | None, dtype: torch.dtype | None = None
) -> Tensor:
    """One parameter of the variant, by the base's name for it; ``dtype`` as for ``variant_tensors``."""
    wanted = dtype or variant_dtype(base, artifact)
    if name not in artifact.names:
        return _converted(base.read(base.held_as(name)), wanted, must=dtype is not None)
    shape = artifact.specs(name)[0].shape
    whole = is_whole(base, name, shape)
    original = torch.empty(0, *shape[1:]) if whole else base.read(base.held_as(name))
    merged = _merged(artifact, name, original, profile, wanted)
    return merged if dtype is None else merged.to(dtype)


def variant_names(base: Checkpoint, artifact: Artifact) -> dict[str, str]:
    """The variant's parameters, sorted by its own names, each with the base's name for it."""
    ours, theirs = base.architecture, variant_architecture(base.architecture, artifact)
    if ours.name != theirs.name:
        names = {name: theirs.name_in(ours, name) for name in sorted(theirs.shapes.keys() - theirs.tied.keys())}
        if missing := set(names.values()) - set(base.names) - set(artifact.names):
            raise UnsupportedArtifact(f"{artifact.path} is a {theirs.name} and lacks {', '.join(sorted(missing))}")
        return names
    known = set(base.names) | set(artifact.names)
    if ours.head is not None and not artifact.manifest.tied_head:
        known.add(ours.head)
    return {name: name for name in sorted(known)}


def variant_vocabulary(base: Checkpoint, artifact: Artifact) -> int:
    """Rows of the variant's embedding."""
    embedding = base.architecture.embedding
    return artifact.specs(embedding)[0].shape[0] if embedding in artifact.names else base.shape(embedding)[0]


def variant_dtype(base: Checkpoint, artifact: Artifact) -> torch.dtype:
    """What the fine-tune was stored in, by its provenance; the base's dtype where that says nothing."""
    name = artifact.manifest.provenance.get("dtype")
    return DTYPES.get(str(name), base.dtype(base.architecture.embedding))


def _merged(artifact: Artifact, name: str, original: Tensor, profile: Profile | None, dtype: torch.dtype) -> Tensor:
    spec = artifact.specs(name)[0]
    oriented = original.T if spec.transposed else original
    if isinstance(spec, XorSpec):
        result = artifact.restore(name, oriented)
    else:
        result = unpack(artifact.delta(name, profile))
        result[: len(oriented)] += oriented
        result = result.to(dtype)
    return (result.T if spec.transposed else result).contiguous()


def _converted(original: Tensor, dtype: torch.dtype, must: bool) -> Tensor:
    """What the fine-tune left alone, in its dtype; as the base has it where that would lose bits and nobody asked."""
    converted = original.to(dtype)
    return converted if must or same_bits(converted, original) else original


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> tuple[int, int]:
    """Files of at most ``SHARD_BYTES``, with transformers' index if there are several; counts tensors and files."""
    shards: list[list[str]] = []
    batch: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(batch, folder / f"{len(shards)}.partial", {"format": "pt"})
        shards.append(list(batch))
        batch.clear()

    for name, tensor in tensors:
        if batch and sum(t.nbytes for t in batch.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        batch[name] = tensor
        total += tensor.nbytes
    flush()
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for i, file in enumerate(files):
        (folder / f"{i}.partial").rename(folder / file)
    return sum(map(len, shards)), len(shards)


def _write_files(folder: Path, base: Checkpoint, artifact: Artifact, dtype: torch.dtype) -> None:
    architecture = variant_architecture(base.architecture, artifact)
    config = variant_config(architecture, variant_vocabulary(base, artifact), artifact.manifest.tied_head, dtype)
    config.save_pretrained(folder)
    for name, content in {**files_of(base.folder), **artifact.files}.items():
        if name != CONFIG:
            (folder / name).write_bytes(content)
