"""Every request of a mixed batch gets, token for token, what its merged model says alone in float32."""

import asyncio
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_variants import SMALL, Variant, alone, collect, greedy, random_prompts, random_variant, serving, version
from tiny_models import tiny_gpt2, tiny_llama
from transformers import PreTrainedModel

from deltaserve.delta_store.errors import RequestRefused
from deltaserve.kernels.parts import Delta
from deltaserve.kernels.reference import unpack
from deltaserve.server.engine.continuous_batching import cache
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.requests import Version

KINDS = ("sparse1", "sparse16", "sparse64", "low_rank", "dense", "rows")
NEW_TOKENS = 12


def variants_of(base: PreTrainedModel, kinds: Sequence[str]) -> dict[str, Variant]:
    return {kind: random_variant(base, kind, seed) for seed, kind in enumerate(kinds, start=1)}


async def staggered(
    engine: Engine, prompts: Sequence[Sequence[int]], owners: Sequence[str | None], count: int
) -> list[list[int]]:
    """All requests, a few milliseconds apart, so that they join a running batch."""

    async def one(i: int) -> list[int]:
        await asyncio.sleep(0.004 * i)
        owner = owners[i]
        return await collect(engine, prompts[i], None if owner is None else Version(owner, owner, ""), greedy(count))

    return await asyncio.gather(*map(one, range(len(prompts))))


def wrong(
    engine: Engine,
    base: PreTrainedModel,
    variants: dict[str, Variant],
    prompts: list[list[int]],
    count: int = NEW_TOKENS,
) -> list[int]:
    """Which requests were not answered as their own model answers alone; owners take turns."""
    names = [None, *variants]
    owners = [names[i % len(names)] for i in range(len(prompts))]
    answers = asyncio.run(staggered(engine, prompts, owners, count))
    models = {None: base, **{name: variant.merged for name, variant in variants.items()}}
    return [
        i
        for i, (prompt, owner) in enumerate(zip(prompts, owners, strict=True))
        if answers[i] != alone(models[owner], prompt, count)
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_every_kind_of_part_equals_its_merged_model(tmp_path: Path, tied: bool) -> None:
    base = tiny_llama(tied=tied, attention_bias=True)
    variants = variants_of(base, KINDS)
    with serving(base, variants, tmp_path, replace(SMALL, bank_slots=6)) as engine:
        assert wrong(engine, base, variants, random_prompts(21, seed=3)) == []
        assert engine.bank.holders == dict.fromkeys(variants, 0)


def test_a_transposed_linear_with_layer_norms_biases_and_positions(tmp_path: Path) -> None:
    base = tiny_gpt2()
    variants = variants_of(base, ("dense", "sparse16", "low_rank"))
    assert {"transformer.wpe.weight", "transformer.h.0.attn.c_attn.bias", "transformer.ln_f.bias"} <= variants[
        "dense"
    ].deltas.keys()
    with serving(base, variants, tmp_path) as engine:
        assert wrong(engine, base, variants, random_prompts(12, seed=4)) == []


def test_the_variants_differ_from_the_base_and_each_other() -> None:
    """Without this the tests above could not fail."""
    base = tiny_llama()
    models = [base, *(variant.merged for variant in variants_of(base, KINDS).values())]
    prompt = random_prompts(1, seed=3)[0]
    assert len({tuple(alone(model, prompt, NEW_TOKENS)) for model in models}) == len(models)


def shared_prefixes(count: int) -> list[list[int]]:
    """Three pages in common, then the same again: several requests of each owner, all with one prefix."""
    return random_prompts(count, seed=5, longest=20, shared=48)


def test_shared_prefixes_stay_within_a_version(tmp_path: Path) -> None:
    base = tiny_llama()
    variants = variants_of(base, ("dense", "sparse16", "low_rank"))
    with serving(base, variants, tmp_path) as engine:
        prompts = shared_prefixes(16)
        assert wrong(engine, base, variants, prompts) == []
        assert asyncio.run(cached_tokens(engine, prompts[1], "dense")) == (len(prompts[1]) - 1) // 16 * 16
        assert asyncio.run(cached_tokens(engine, prompts[0], "dense")) == 48


async def cached_tokens(engine: Engine, prompt: list[int], owner: str) -> int:
    stream = await engine.submit(prompt, Version(owner, owner, ""), greedy(1))
    async for _ in stream:
        pass
    assert stream.finished is not None
    return stream.finished.cached_tokens


def test_without_the_salt_shared_prefixes_give_wrong_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the salt is for: with it taken out, one version continues what another one computed."""
    monkeypatch.setattr(cache, "salt_of", lambda request_id: None)
    base = tiny_llama()
    variants = variants_of(base, ("dense", "sparse16", "low_rank"))
    with serving(base, variants, tmp_path) as engine:
        assert wrong(engine, base, variants, shared_prefixes(16)) != []


def test_a_full_cache_displaces_requests_and_brings_them_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    displaced = []
    displace = cache.api.OffloadingManager.offload_requests
    monkeypatch.setattr(
        cache.api.OffloadingManager,
        "offload_requests",
        lambda self: displaced.append(1) or displace(self),
    )
    base = tiny_llama()
    variants = variants_of(base, ("dense", "sparse16"))
    prompts = random_prompts(9, seed=6, longest=40)
    with serving(base, variants, tmp_path, replace(SMALL, cache_tokens=192, context=150)) as engine:
        assert wrong(engine, base, variants, prompts, count=60) == []
    assert displaced


def test_prompts_of_one_token_begin_in_a_step_with_longer_ones(tmp_path: Path) -> None:
    """A step that reads nothing from the cache: its keys are laid out otherwise."""
    base = tiny_llama()
    variants = variants_of(base, ("dense",))
    prompts = [[5, 9, 33], [7], [2, 11], [40], [7]]
    owners = [None, "dense", "dense", None, None]

    async def at_once(engine: Engine) -> list[list[int]]:
        versions = [None if owner is None else Version(owner, owner, "") for owner in owners]
        return await asyncio.gather(
            *(collect(engine, prompt, on, greedy(12)) for prompt, on in zip(prompts, versions, strict=True))
        )

    with serving(base, variants, tmp_path) as engine:
        asyncio.run(at_once(engine))  # loads the variant, so that the next ones all begin together
        answers = asyncio.run(at_once(engine))
    models = {None: base, "dense": variants["dense"].merged}
    assert answers == [alone(models[owner], prompt, 12) for owner, prompt in zip(owners, prompts, strict=True)]


def test_equal_requests_at_once_all_get_the_same(tmp_path: Path) -> None:
    """What a request for n > 1 choices becomes."""
    base = tiny_llama()
    variants = variants_of(base, ("dense",))
    prompt = random_prompts(1, seed=7)[0]
    with serving(base, variants, tmp_path) as engine:
        answers = asyncio.run(staggered(engine, [prompt] * 8, ["dense", None] * 4, NEW_TOKENS))
    assert answers == [alone(variants["dense"].merged, prompt, NEW_TOKENS), alone(base, prompt, NEW_TOKENS)] * 4


def test_a_vocab_grown_works_for_that_variant_only(tmp_path: Path) -> None:
    base = tiny_llama(vocab=64)
    grown = random_variant(base, "rows", seed=1, vocab=67)
    variants = {"grown": grown, "dense": random_variant(base, "dense", seed=2)}
    prompts = random_prompts(9, seed=8, longest=30)
    new_ids = [[64, 5, 66], [65, 66, 64, 64], [66]]
    with serving(base, variants, tmp_path) as engine:
        assert wrong(engine, base, variants, prompts, count=30) == []
        answers = asyncio.run(staggered(engine, new_ids + prompts[:3], ["grown"] * 3 + [None, "dense", None], 30))
        with pytest.raises(RequestRefused, match="id 64; the vocabulary has ids 0 to 63"):
            asyncio.run(collect(engine, [64], version("dense", "dense"), greedy(1)))
    assert answers[:3] == [alone(grown.merged, prompt, 30) for prompt in new_ids]
    assert {id for answer in answers[:3] for id in answer} & {64, 65, 66}
    assert max(id for answer in answers[3:] for id in answer) < 64


def untied(base: PreTrainedModel, embedding: Delta | None, head: Delta | None) -> Variant:
    """A variant whose embedding and head, one matrix in the base, get different deltas."""
    merged = deepcopy(base)
    shared = base.get_input_embeddings().weight.detach()
    merged.config.tie_word_embeddings = False
    merged.lm_head.weight = torch.nn.Parameter(shared + (unpack(head) if head is not None else 0))
    merged.model.embed_tokens.weight = torch.nn.Parameter(shared + (unpack(embedding) if embedding is not None else 0))
    named = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    return Variant({name: delta for name, delta in named.items() if delta is not None}, False, merged)


def test_a_tied_head_appears_and_parts_from_its_embedding(tmp_path: Path) -> None:
    """The base ties embedding and head, variants give each its own values; the base's own answers do not change."""
    base = tiny_llama(tied=True)
    embedding = random_variant(base, "dense", seed=1).deltas["model.embed_tokens.weight"]
    head = random_variant(tiny_llama(tied=False), "low_rank", seed=2).deltas["lm_head.weight"]
    variants = {
        "both": untied(base, embedding, head),
        "embedding alone": untied(base, embedding, None),
        "head alone": untied(base, None, head),
        "tied": random_variant(base, "sparse16", seed=3),
    }
    with serving(base, variants, tmp_path) as engine:
        assert wrong(engine, base, variants, random_prompts(15, seed=9)) == []
