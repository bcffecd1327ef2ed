"""Run text through the base once and write down how strongly each input of each linear layer is driven."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.errors import BaseMismatch, OptionError
from deltaserve.delta_store.profile import Profile, file_name, find_profile, profile_folder, write_profile, write_whole
from deltaserve.delta_store.running.memory import AUTO, runner_for
from deltaserve.delta_store.running.weights import of_base
from deltaserve.delta_store.text import WINDOW_TOKENS, Sample, read_samples, tokenizer_of, windows

Count = Callable[[int, int], None]
"""Called with how much is done, and of how much."""

CALIBRATION_TOKENS = 4096
FIRST_LOOK_TOKENS = 8
TOPIC_CHARACTERS = 800
BUILT_IN = "built-in prose"


def profile_for(
    base: Checkpoint,
    fingerprint: str,
    text: Path | None,
    file: Path | None,
    progress: Count = lambda done, total: None,
    memory: str = AUTO,
) -> Profile:
    """The base's profile on ``text``, or on prose that every Python has; computed once, then taken from the cache.

    With ``file`` it is taken from there, or written there too if there is no such file. Computing it takes as much of
    the model as ``memory`` says (``running/``). Raises OptionError for a text that cannot be used, or beside a file;
    BaseMismatch for another base's file.
    """
    if file is None or not file.exists():
        profile = _cached(base, fingerprint, text, progress, memory)
        if file is not None:
            write_whole(file, (profile_folder() / file_name(profile.digest)).read_bytes())
        return profile
    if text is not None:
        raise OptionError(f"{file} is a finished profile, so no calibration text is read; give one of the two")
    profile = Profile.open(file)
    if profile.base != fingerprint:
        raise BaseMismatch(f"{file} is the profile of another base than {base.folder}; leave it out to have one made")
    write_whole(profile_folder() / file_name(profile.digest), file.read_bytes())
    return profile


def _cached(base: Checkpoint, fingerprint: str, text: Path | None, progress: Count, memory: str) -> Profile:
    samples = calibration_samples(base, text, CALIBRATION_TOKENS, base.folder)
    kept = profile_folder() / "profiles" / _hash(fingerprint, samples)
    if kept.is_file() and (profile_folder() / file_name(kept.read_text())).is_file():
        return find_profile(kept.read_text(), profile_folder())
    runner, _ = runner_for(memory, sum(prod(base.shape(name)) for name in base.names))
    rms, vector_of = measure_inputs(partial(runner.run, of_base(base)), samples, progress)
    source = "built-in text" if text is None else text.name
    profile = write_profile(profile_folder(), fingerprint, rms, vector_of, source)
    write_whole(kept, profile.digest.encode())
    return profile


def built_in_text() -> str:
    """Prose that every Python has: the beginnings of the topics that ``help()`` knows."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name][:TOPIC_CHARACTERS] for name in sorted(topics))


def calibration_samples(base: Checkpoint, text: Path | None, limit: int, *folders: Path) -> list[Sample]:
    """At most ``limit`` scored tokens of ``text``, or of prose that every Python has, by the first tokenizer found.

    Raises OptionError for a text that cannot be used.
    """
    tokenizer = tokenizer_of(*folders)
    if tokenizer is None and text is not None:
        raise OptionError(f"The base {base.folder.name} has no tokenizer, so it cannot read {text}; leave the text out")
    if tokenizer is None:
        return _random_samples(base.shape(base.architecture.embedding)[0], limit)
    if text is None:
        return windows(built_in_text(), tokenizer, limit)
    return read_samples(text, tokenizer, limit)


def _random_samples(vocabulary: int, limit: int) -> list[Sample]:
    """Fixed random ids, for a base without a tokenizer: measured, they serve nearly as well as text."""
    shape = (limit // WINDOW_TOKENS, WINDOW_TOKENS)
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    return [Sample(tuple(row)) for row in ids.tolist()]


def _hash(fingerprint: str, samples: list[Sample]) -> str:
    return hashlib.sha256(repr((fingerprint, [sample.ids for sample in samples])).encode()).hexdigest()


def measure_inputs(
    run: Callable[..., Any], samples: Sequence[Sample], progress: Count = lambda done, total: None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``rms`` float64 ``[in]`` by vector name, and the vector's name by parameter name.

    ``run`` is a runner's (``running/``), of one model. The output head is left out: it is not run, since it costs most
    and its delta is stored by low rank.
    """
    leader_of = _shared_inputs(run, samples[0])
    squares: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(name: str, inputs: Tensor) -> None:
        if leader_of.get(name, name) == name:
            flat = inputs.reshape(-1, inputs.shape[-1]).float()
            squares[name] = squares.get(name, 0) + flat.square().sum(0).double()
            rows[name] = rows.get(name, 0) + len(flat)

    run(samples, body_outputs, progress, lambda model: watching(_linears(model), add))
    rms = {name: (total / rows[name]).sqrt().cpu() for name, total in squares.items()}
    reached = {name: leader_of.get(name, name) for name in rms.keys() | leader_of.keys()}
    return rms, {f"{name}.weight": leader for name, leader in reached.items() if leader in rms}


def is_linear(module: nn.Module) -> bool:
    """Whether this is a weight times an input: an ``nn.Linear``, or GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _linears(model: Any) -> dict[nn.Module, str]:
    names = {module: name for name, module in model.named_modules()}
    return {module: names[module] for module in model.base_model.modules() if is_linear(module)}


def body_outputs(model: Any, sample: Sample) -> None:
    """Run the model without its head, for those who watch its layers."""
    model.base_model(input_ids=torch.tensor([sample.ids]), use_cache=False)


def _shared_inputs(run: Callable[..., Any], sample: Sample) -> dict[str, str]:
    """For each layer the first layer that is given the very same tensor: q for q, k and v."""
    seen: list[tuple[str, Tensor]] = []  # keeps the tensors, so that identity cannot be mistaken
    leader_of: dict[str, str] = {}

    def look(name: str, inputs: Tensor) -> None:
        leader_of[name] = next((first for first, tensor in seen if tensor is inputs), name)
        seen.append((leader_of[name], inputs))

    short = Sample(sample.ids[:FIRST_LOOK_TOKENS])
    run([short], body_outputs, inside=lambda model: watching(_linears(model), look))
    return leader_of


@contextmanager
def watching(layers: Mapping[nn.Module, str], call: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Have ``call(layer name, input)`` made before each of the layers runs."""

    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        call(layers[module], arguments[0])

    handles = [module.register_forward_pre_hook(hook) for module in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
