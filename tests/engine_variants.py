"""Variants of a tiny model: random deltas of every kind, the models they stand for, and an engine that serves them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_models import save
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltaserve.kernels import reference
from deltaserve.kernels.codes import float_codes
from deltaserve.kernels.parts import Codes, Delta, Dense, LowRank, Rows, Sparse
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.limits import EngineLimits
from deltaserve.server.engine.requests import Sampling, Version
from deltaserve.server.engine.wrapped import VersionDeltas

SMALL = EngineLimits(cache_tokens=1024, batch_tokens=32, context=200, bank_slots=4, max_running=16)


@dataclass(frozen=True, slots=True)
class Variant:
    """What an artifact would hold, and the model that it stands for, merged in float32."""

    deltas: dict[str, Delta]
    tied_head: bool
    merged: PreTrainedModel


def version(name: str, digest: str | None = None) -> Version:
    return Version(name, digest or f"digest of {name}", "")


def random_variant(
    base: PreTrainedModel, kind: str, seed: int, scale: float = 0.3, vocab: int | None = None
) -> Variant:
    """Every matrix gets a delta of ``kind``, every vector a dense one; of ``vocab`` rows, those added are in full."""
    rng = torch.Generator().manual_seed(seed)
    tied = bool(base.config.tie_word_embeddings)
    merged = deepcopy(base)
    if vocab is not None:
        merged.resize_token_embeddings(vocab, mean_resizing=False)
    deltas: dict[str, Delta] = {}
    for name, parameter in merged.named_parameters():
        is_transposed = isinstance(merged.get_submodule(name.rpartition(".")[0]), Conv1D) and parameter.ndim == 2
        shape = tuple(parameter.shape)[::-1] if is_transposed else tuple(parameter.shape)
        own = base.get_parameter(name).shape[0]
        deltas[name] = delta = _random_delta(rng, kind, shape, own, scale)
        dense = reference.unpack(delta)
        with torch.no_grad():
            if parameter.shape[0] > own and not is_transposed:
                parameter[own:] = 0
            parameter += dense.T if is_transposed else dense
    return Variant(deltas, tied, merged.eval())


def _random_delta(rng: torch.Generator, kind: str, shape: tuple[int, ...], own_rows: int, scale: float) -> Delta:
    def noise(*size: int) -> Codes:
        return float_codes(scale * torch.randn(size, generator=rng))

    if len(shape) == 1 or kind == "dense":
        return Delta(shape, (Dense(shape, noise(*shape)),))
    out, width = shape
    if out > own_rows or kind == "rows":
        return Delta(shape, (Rows((out, width), torch.arange(out), noise(out, width), None, own_rows),))
    if kind == "low_rank":
        return Delta(shape, (LowRank((out, width), noise(4, width), noise(out, 4)),))
    block = int(kind.removeprefix("sparse"))
    blocks, kept = -(-out // block), width // 4
    columns = torch.stack([torch.randperm(width, generator=rng)[:kept].sort().values for _ in range(blocks)]).int()
    return Delta(shape, (Sparse((out, width), columns, noise(blocks, kept, block), torch.full((width,), 2.0)),))


@contextmanager
def serving(
    base: PreTrainedModel,
    variants: Mapping[str, Variant],
    folder: Path,
    limits: EngineLimits = SMALL,
    load: Callable[[Version], VersionDeltas] | None = None,
) -> Iterator[Engine]:
    """A started engine of ``base``; ``variants`` by digest."""

    def from_memory(wanted: Version) -> VersionDeltas:
        variant = variants[wanted.digest]
        return VersionDeltas(variant.deltas.items(), variant.tied_head)

    folder.mkdir(exist_ok=True)
    engine = Engine(save(base, folder, vocab=64), limits=limits, load=load or from_memory)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def alone(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """What ``model`` says by itself: greedy, by transformers' own ``generate``."""
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return ids[0, len(prompt) :].tolist()


def greedy(count: int) -> Sampling:
    return Sampling(max_tokens=count, temperature=0, ignore_eos=True)


def random_prompts(count: int, seed: int, longest: int = 90, vocab: int = 64, shared: int = 0) -> list[list[int]]:
    """Prompts of 1 to ``longest`` tokens after ``shared`` common ones."""
    rng = torch.Generator().manual_seed(seed)
    head = torch.randint(vocab, (shared,), generator=rng).tolist()
    lengths = torch.randint(1, longest + 1, (count,), generator=rng).tolist()
    return [head + torch.randint(vocab, (length,), generator=rng).tolist() for length in lengths]


async def collect(engine: Engine, prompt: Sequence[int], on: Version | None, sampling: Sampling) -> list[int]:
    """The token ids of one request."""
    return [token.token_id async for token in await engine.submit(prompt, on, sampling)]
