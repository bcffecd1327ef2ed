"""The same proof on the demo's real base and its real variants, in one batch."""

import asyncio
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from engine_variants import alone, collect, greedy
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.profile import Profile
from deltaserve.kernels.reference import unpack
from deltaserve.server.engine.engine import Engine, EngineLimits
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


def test_variants_of_a_real_model_equal_their_merged_models() -> None:
    engine = Engine(
        base_folder(), limits=EngineLimits(cache_tokens=1024), profile_path=lambda _: DEMO / "profile.safetensors"
    )
    prompts = [engine.tokenizer(text).input_ids for text in TEXTS]
    owners = [None, *ARTIFACTS]
    jobs = [(owner, prompt) for prompt in prompts for owner in owners]

    async def all_at_once() -> list[list[int]]:
        versions = {path: Version(path.stem, open_artifact(path).digest, str(path)) for path in ARTIFACTS}
        return await asyncio.gather(
            *(collect(engine, prompt, versions.get(owner), greedy(NEW_TOKENS)) for owner, prompt in jobs)  # type: ignore[arg-type]
        )

    engine.start()
    try:
        answers = asyncio.run(all_at_once())
    finally:
        engine.stop()
    for owner in owners:
        model = merged(owner)
        for (whose, prompt), answer in zip(jobs, answers, strict=True):
            if whose == owner:
                assert answer == alone(model, prompt, NEW_TOKENS), owner
    by_owner = {tuple(tuple(a) for (whose, _), a in zip(jobs, answers, strict=True) if whose == o) for o in owners}
    assert len(by_owner) == len(owners)
