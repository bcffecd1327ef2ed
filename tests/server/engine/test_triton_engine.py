"""The engine with the GPU's kernels: on a GPU, or without one in Triton's interpreter with the base on the CPU.

Models are as small as they can be: the interpreter takes a millisecond for a program that does nothing.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_variants import SMALL, Variant, alone, collect, greedy, random_variant, serving, version
from tiny_models import tiny_gpt2, tiny_llama
from torch_flash import install
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.model_runner import ModelRunner

from deltaserve.delta_store.errors import ArtifactError
from deltaserve.kernels.parts import Dense
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.requests import Version

pytest.importorskip("triton")

from deltaserve.kernels.triton import operations

LIMITS = replace(SMALL, backend="triton", batch_tokens=12, max_running=4, bank_slots=4, policy="mixed")
KINDS = ("sparse16", "low_rank", "dense")
PROMPTS = [[5, 9, 33], [7, 2, 11, 40, 3, 8], [12], [30, 31]]
TOKENS = 4


@pytest.fixture(autouse=True)
def _few_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many are computed for each row, whatever its variant has; 256 would take the interpreter ten times as long."""
    monkeypatch.setattr(operations, "LARGEST_RANK", 16)


def llama() -> PreTrainedModel:
    return tiny_llama(hidden=16, layers=1, attention_bias=True)


def variants_of(base: PreTrainedModel, kinds: Sequence[str] = KINDS) -> dict[str, Variant]:
    return {kind: random_variant(base, kind, seed) for seed, kind in enumerate(kinds, start=1)}


def named(name: str | None) -> Version | None:
    return None if name is None else version(name, name)


async def at_once(engine: Engine, owners: Sequence[str | None], count: int = TOKENS) -> list[list[int]]:
    asked = zip(PROMPTS, owners, strict=False)
    return await asyncio.gather(*(collect(engine, prompt, named(owner), greedy(count)) for prompt, owner in asked))


def expected(
    base: PreTrainedModel, variants: Mapping[str, Variant], owners: Sequence[str | None], count: int = TOKENS
) -> list[list[int]]:
    models = {None: base, **{name: variant.merged for name, variant in variants.items()}}
    return [alone(models[owner], prompt, count) for prompt, owner in zip(PROMPTS, owners, strict=False)]


def tables_of(engine: Engine) -> list[int]:
    """Where the tables are that the kernels read."""
    routing = engine._batching._routing
    every = (routing.tokens, routing.body, routing.logits)
    return [tensor.data_ptr() for rows in every for tensor in (rows.segments.table, rows.places)]


def test_a_mixed_batch_equals_the_merged_models_through_tables_that_stay(tmp_path: Path) -> None:
    base = llama()
    variants = variants_of(base)
    changed = {
        name
        for variant in variants.values()
        for name, delta in variant.deltas.items()
        if isinstance(delta.parts[0], Dense)
    }
    assert {"model.norm.weight", "model.layers.0.self_attn.q_proj.bias"} <= changed
    owners = [None, *KINDS]
    with serving(base, variants, tmp_path, LIMITS) as engine:
        before = tables_of(engine)
        assert asyncio.run(at_once(engine, owners)) == expected(base, variants, owners)
        assert tables_of(engine) == before


def test_layer_norms_transposed_weights_and_positions(tmp_path: Path) -> None:
    base = tiny_gpt2(hidden=16, layers=1)
    variants = variants_of(base, ("dense", "sparse16"))
    owners = ["dense", None, "sparse16"]
    with serving(base, variants, tmp_path, LIMITS) as engine:
        assert asyncio.run(at_once(engine, owners, count=2)) == expected(base, variants, owners, count=2)


def test_added_tokens_are_their_variants_alone(tmp_path: Path) -> None:
    base = llama()
    variants = {"grown": random_variant(base, "rows", 1, vocab=67), "dense": random_variant(base, "dense", 2)}
    owners = ["grown", "dense", None]
    with serving(base, variants, tmp_path, LIMITS) as engine:
        assert asyncio.run(at_once(engine, owners)) == expected(base, variants, owners)
        assert asyncio.run(collect(engine, [64, 66], named("grown"), greedy(2))) == alone(
            variants["grown"].merged, [64, 66], 2
        )


def test_a_variant_goes_into_the_weights_and_the_base_comes_back_bit_for_bit(tmp_path: Path) -> None:
    base = llama()
    variants = variants_of(base, ("sparse16",))
    with serving(base, variants, tmp_path, replace(LIMITS, policy="swap")) as engine:
        before = {name: weight.clone() for name, weight in engine._batching.model.named_parameters()}
        for owner in (None, "sparse16", None):
            assert asyncio.run(at_once(engine, [owner], count=2)) == expected(base, variants, [owner], count=2)
            assert engine.policy.swapped == ("" if owner is None else version(owner, owner).digest)
        assert all(torch.equal(weight, before[name]) for name, weight in engine._batching.model.named_parameters())
        assert engine.policy.swaps == 2


def test_running_requests_keep_a_version_that_is_unloaded_and_new_ones_get_the_next(tmp_path: Path) -> None:
    """One slot and the spare one: what is loaded meanwhile is written into the tables that the running step reads."""
    base = llama()
    variants = variants_of(base)

    async def main(engine: Engine) -> list[list[int]]:
        old = await engine.submit(PROMPTS[0], Version("v", "dense", ""), greedy(8))
        tokens = aiter(old)
        answer = [(await anext(tokens)).token_id]
        engine.forget("dense")
        new = await collect(engine, PROMPTS[0], Version("v", "sparse16", ""), greedy(3))
        answer += [token.token_id async for token in tokens]
        next_one = await collect(engine, PROMPTS[0], Version("v", "low_rank", ""), greedy(3))
        return [answer, new, next_one]

    with serving(base, variants, tmp_path, replace(LIMITS, bank_slots=1)) as engine:
        answers = asyncio.run(main(engine))
        assert list(engine.bank.holders) == ["low_rank"]
    owners = {"dense": 8, "sparse16": 3, "low_rank": 3}
    assert answers == [alone(variants[name].merged, PROMPTS[0], count) for name, count in owners.items()]


def test_padded_rows_are_nobodys(tmp_path: Path) -> None:
    """Steps as they are where some become graphs: all of 12 tokens and 4 rows of the head."""
    base = llama()
    variants = variants_of(base)
    owners = [None, *KINDS]
    with serving(base, variants, tmp_path, LIMITS) as engine:
        engine._batching.batch_processor.model_runner.pad_inputs = True
        assert asyncio.run(at_once(engine, owners)) == expected(base, variants, owners)
        tables = engine._batching._routing
        assert (len(tables.tokens.places), len(tables.logits.places)) == (12, 4)


def test_one_recorded_step_serves_variants_that_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoding step that a GPU captures, made again from its first arguments with other variants in its slots."""
    install(monkeypatch)
    base = llama()
    variants = variants_of(base) | {"grown": random_variant(base, "rows", 5, vocab=67)}
    batches = [["sparse16", None], ["low_rank", "dense"], ["dense", "sparse16"], [None, "grown"]]
    with serving(base, variants, tmp_path, replace(LIMITS, max_running=2, bank_slots=2)) as engine:
        graphs = engine._batching.batch_processor.inputs_and_outputs.graphs
        recorded = dict(graphs._storage)
        assert sorted(recorded) == [(1,), (2,)]  # by requests, once it has started
        for owners in batches:
            replays = sum(graph.replays for graph in recorded.values())
            assert asyncio.run(at_once(engine, owners)) == expected(base, variants, owners)
            replayed = sum(graph.replays for graph in recorded.values()) - replays
            assert (replayed > 0) == ("grown" not in owners)
        assert dict(graphs._storage) == recorded


def test_a_step_that_cannot_be_captured_runs_without_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    install(monkeypatch)
    monkeypatch.setattr(ModelRunner, "_capture_graph", fail)
    base = llama()
    with serving(base, {}, tmp_path, LIMITS) as engine:
        assert asyncio.run(at_once(engine, [None, None])) == expected(base, {}, [None, None])
        assert not engine._batching.batch_processor.inputs_and_outputs.graphs._storage


def test_a_rank_that_no_slot_takes_fails_that_variant_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "LARGEST_RANK", 3)
    base = llama()
    with serving(base, variants_of(base, ("low_rank",)), tmp_path, LIMITS) as engine:
        with pytest.raises(ArtifactError, match="of rank 4; the GPU kernels run at most 3"):
            asyncio.run(collect(engine, PROMPTS[0], named("low_rank"), greedy(1)))
        assert asyncio.run(at_once(engine, [None], count=1)) == expected(base, {}, [None], count=1)
