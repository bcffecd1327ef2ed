"""The same proof on the demo's real base and its real variants, in one batch and swapped in one after the other."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from engine_variants import alone, collect, greedy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.profile import Profile
from deltaserve.kernels.reference import unpack
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.limits import EngineLimits
from deltaserve.server.engine.requests import Version

DEMO = Path(__file__).parents[3] / "deploy" / "demo"
ARTIFACTS = sorted((DEMO / "variants").glob("*.safetensors"))
TEXTS = ("The capital of France is", "And it came to pass", "def add(a, b):\n    return", "A dull film, far too long.")
NEW_TOKENS = 6


@cache
def base_folder() -> Path:
    """The demo's base, converted if this machine does not have it yet."""
    command = [sys.executable, str(DEMO / "base.py")]
    return Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def merged(path: Path | None) -> PreTrainedModel:
    """The base in float32, with all deltas of an artifact added."""
    model = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32).eval()
    if path is not None:
        artifact, profile = open_artifact(path), Profile.open(DEMO / "profile.safetensors")
        with torch.no_grad():
            for name in artifact.names:
                model.get_parameter(name).add_(unpack(artifact.delta(name, profile)))
    return model  # type: ignore[no-any-return]


@cache
def own_answers(path: Path | None) -> list[list[int]]:
    """What the merged model says to each of ``TEXTS``, alone."""
    model = merged(path)
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    return [alone(model, tokenizer(text).input_ids, NEW_TOKENS) for text in TEXTS]


@contextmanager
def real_engine(policy: str) -> Iterator[Engine]:
    limits = EngineLimits(cache_tokens=1024, policy=policy)
    engine = Engine(base_folder(), limits=limits, profile_path=lambda _: DEMO / "profile.safetensors")
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


async def ask(engine: Engine, owners: Sequence[Path | None]) -> list[list[list[int]]]:
    """Every owner is asked every text, all at once."""

    async def one(owner: Path | None) -> list[list[int]]:
        on = None if owner is None else Version(owner.stem, open_artifact(owner).digest, str(owner))
        prompts = [engine.tokenizer(text).input_ids for text in TEXTS]
        return await asyncio.gather(*(collect(engine, prompt, on, greedy(NEW_TOKENS)) for prompt in prompts))

    return await asyncio.gather(*map(one, owners))


def test_variants_of_a_real_model_equal_their_merged_models() -> None:
    owners = [None, *ARTIFACTS]
    with real_engine("mixed") as engine:
        answers = asyncio.run(ask(engine, owners))
    assert answers == [own_answers(owner) for owner in owners]
    assert len({str(answer) for answer in answers}) == len(owners)


def test_swapped_variants_of_a_real_model_equal_their_merged_models_and_leave_the_base_as_it_was() -> None:
    with real_engine("swap") as engine:
        weights = dict(engine._batching.model.named_parameters())
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        assert asyncio.run(ask(engine, ARTIFACTS)) == [own_answers(path) for path in ARTIFACTS]
        assert engine.policy.swapped
        assert asyncio.run(ask(engine, [None])) == [own_answers(None)]
        assert engine.policy.swapped == ""
        assert engine.policy.swaps == 2 * len(ARTIFACTS)
        changed = [
            name for name in before if not torch.equal(weights[name].view(torch.int32), before[name].view(torch.int32))
        ]
        assert changed == []
