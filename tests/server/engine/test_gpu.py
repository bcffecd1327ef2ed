"""The engine on a GPU: answers, and CUDA graphs that are replayed while variants come and go. No GPU: not run."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_variants import SMALL, alone, collect, greedy, random_prompts, random_variant, serving
from tiny_models import tiny_gpt2, tiny_llama
from transformers import PreTrainedModel

from deltaserve.server.engine import flash
from deltaserve.server.engine.continuous_batching import manager
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.requests import Version

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_flash = pytest.mark.skipif(flash.installed() is None, reason="needs a flash-attn package and a GPU")

KINDS = ("sparse1", "sparse16", "low_rank", "dense", "rows")
GPU = replace(SMALL, device="cuda", bank_slots=3)
HALF = replace(GPU, dtype="float16", cache_tokens=8192)
PROMPTS = random_prompts(12, seed=3)


def answers(engine: Engine, owners: list[str | None], count: int = 12) -> list[list[int]]:
    async def main() -> list[list[int]]:
        asked = zip(PROMPTS, owners, strict=True)
        named = [(prompt, None if owner is None else Version(owner, owner, "")) for prompt, owner in asked]
        return await asyncio.gather(*(collect(engine, prompt, on, greedy(count)) for prompt, on in named))

    return asyncio.run(main())


@pytest.mark.parametrize("policy", ["mixed", "swap", "auto"])
@pytest.mark.parametrize("base", [tiny_llama(attention_bias=True), tiny_gpt2()], ids=["llama", "gpt2"])
def test_answers_are_those_of_the_merged_models(tmp_path: Path, base: PreTrainedModel, policy: str) -> None:
    variants = {kind: random_variant(base, kind, seed) for seed, kind in enumerate(KINDS, start=1)}
    owners = [[None, *KINDS][i % 6] for i in range(len(PROMPTS))]
    models = {None: base} | {kind: variant.merged for kind, variant in variants.items()}
    with serving(base, variants, tmp_path, replace(GPU, policy=policy)) as engine:
        assert engine._batching.model.device.type == "cuda"
        assert answers(engine, owners) == [alone(models[o], p, 12) for p, o in zip(PROMPTS, owners, strict=True)]


@needs_flash
@pytest.mark.parametrize("base", [tiny_llama(hidden=128), tiny_gpt2(hidden=128)], ids=["llama", "gpt2"])
def test_captured_steps_say_what_the_same_steps_say_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: PreTrainedModel
) -> None:
    """Variants are loaded, evicted and loaded again between replays: there are more of them than slots."""
    variants = {kind: random_variant(base, kind, seed) for seed, kind in enumerate(KINDS, start=1)}
    batches = [[[None, *KINDS][(i + turn) % 6] for i in range(len(PROMPTS))] for turn in range(3)]
    with serving(base, variants, tmp_path / "graphs", HALF) as engine:
        graphs = engine._batching.batch_processor.inputs_and_outputs.graphs._storage
        assert set(graphs) == {(1,), (2,), (4,), (8,), (16,)}
        captured = dict(graphs)
        with_graphs = [answers(engine, owners) for owners in batches]
        assert dict(graphs) == captured
    monkeypatch.setattr(manager.Batching, "warm_up_sizes", [1])
    monkeypatch.setattr("deltaserve.server.engine.engine.can_be_captured", lambda model: False)
    with serving(base, variants, tmp_path / "eager", HALF) as engine:
        assert not engine._batching.batch_processor.inputs_and_outputs.graphs._storage
        assert [answers(engine, owners) for owners in batches] == with_graphs


@needs_flash
def test_flash_attention_is_taken_for_half_precision_only() -> None:
    model = tiny_llama(hidden=128).cuda()
    assert flash.implementation(model) is None
    assert flash.implementation(model.half()) == flash.installed()
