"""How the base's weights are kept: int8 is smaller and serves variants, bfloat16 goes through the same layers."""

import asyncio
import gc
import weakref
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_variants import SMALL, alone, collect, greedy, random_prompts, random_variant, serving
from tiny_models import tiny_gpt2, tiny_llama
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltaserve.delta_store.errors import OptionError
from deltaserve.kernels.dispatch import backend
from deltaserve.kernels.weights import quantised
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.layers import DeltaLinear
from deltaserve.server.engine.requests import Version
from deltaserve.server.engine.routing import Routing
from deltaserve.server.engine.wrapped import WrappedModel

INT8 = replace(SMALL, weights="int8", bank_slots=6)
KINDS = ("sparse1", "sparse16", "low_rank", "dense", "rows")
BASES = {"tied": tiny_llama(attention_bias=True), "untied": tiny_llama(tied=False), "transposed": tiny_gpt2()}


def spelled_out(base: PreTrainedModel) -> PreTrainedModel:
    """The same int8 model as an ordinary one in float32: each linear layer has the values that its codes stand for."""
    model = deepcopy(base)
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight.detach()
            values = weight.T if isinstance(module, Conv1D) else weight
            dense = quantised(values).dense()
            module.weight = nn.Parameter(dense.T.contiguous() if isinstance(module, Conv1D) else dense)
    model.config.tie_word_embeddings = False  # the head has been rounded, the embedding has not
    return model


def with_deltas(base: PreTrainedModel, own: PreTrainedModel, merged: PreTrainedModel) -> PreTrainedModel:
    """``own`` with what was added to ``base`` to make ``merged``."""
    model = deepcopy(own)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += merged.get_parameter(name) - base.get_parameter(name)
    return model


def answers(engine: Engine, prompts: Sequence[list[int]], owners: Sequence[str | None]) -> list[list[int]]:
    async def main() -> list[list[int]]:
        return await asyncio.gather(
            *(
                collect(engine, prompt, None if owner is None else Version(owner, owner, ""), greedy(12))
                for prompt, owner in zip(prompts, owners, strict=True)
            )
        )

    return asyncio.run(main())


@pytest.mark.parametrize("name", BASES)
def test_a_mixed_batch_on_int8_equals_the_same_int8_model_with_the_delta_added(tmp_path: Path, name: str) -> None:
    base = BASES[name]
    own = spelled_out(base)
    variants = {kind: random_variant(base, kind, seed) for seed, kind in enumerate(KINDS, start=1)}
    models = {None: own} | {kind: with_deltas(base, own, variant.merged) for kind, variant in variants.items()}
    names = [None, *KINDS]
    prompts = random_prompts(18, seed=3, longest=40)
    owners = [names[i % len(names)] for i in range(len(prompts))]
    with serving(base, variants, tmp_path, INT8) as engine:
        assert answers(engine, prompts, owners) == [
            alone(models[owner], prompt, 12) for owner, prompt in zip(owners, prompts, strict=True)
        ]
        assert engine.policy.swaps == 0
    assert any((p != q).any() for p, q in zip(own.parameters(), base.parameters(), strict=False))


def tensor_bytes(model: PreTrainedModel) -> int:
    """Parameters, each once, and what belongs to them."""
    parameters = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    scales = [m.scales.nbytes for m in model.modules() if isinstance(m, DeltaLinear) and m.scales is not None]
    return sum(parameters.values()) + sum(scales)


@pytest.mark.parametrize("tied", [True, False])
def test_int8_weights_take_a_quarter_and_the_float_ones_are_freed(tied: bool) -> None:
    model = tiny_llama(hidden=64, tied=tied)
    before = tensor_bytes(model)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    body = [m.weight for m in linear if m is not model.lm_head or not tied]
    float_bytes = sum(weight.nbytes for weight in body)
    freed = [weakref.ref(weight.untyped_storage()) for weight in body]
    scales = sum(m.weight.shape[0] * 4 for m in linear)
    head_copy = model.lm_head.weight.numel() if tied else 0
    del body
    WrappedModel(model, Routing(), 2, backend(), tied=tied, kept="int8")
    gc.collect()
    assert tensor_bytes(model) == before - float_bytes + float_bytes // 4 + scales + head_copy
    assert [storage() for storage in freed] == [None] * len(freed)
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.int8


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_base_on_int8_with_every_kind_of_kernel(tmp_path: Path, kernels: str) -> None:
    base = BASES["tied"]
    prompts = random_prompts(4, seed=4)
    with serving(base, {}, tmp_path, replace(INT8, backend=kernels)) as engine:
        own = spelled_out(base)
        assert answers(engine, prompts, [None] * 4) == [alone(own, prompt, 12) for prompt in prompts]


def test_packed_weights_serve_the_same_tokens_and_are_not_swapped(tmp_path: Path) -> None:
    base = BASES["tied"]
    variants = {kind: random_variant(base, kind, seed) for seed, kind in enumerate(KINDS, start=1)}
    models = {None: base} | {kind: variant.merged for kind, variant in variants.items()}
    names, prompts = list(models), random_prompts(8, seed=6)
    owners = [names[i % len(names)] for i in range(len(prompts))]
    with serving(base, variants, tmp_path, replace(SMALL, weights="packed", bank_slots=6)) as engine:
        wanted = [alone(models[owner], prompt, 12) for owner, prompt in zip(owners, prompts, strict=True)]
        assert answers(engine, prompts, owners) == wanted
    with (
        pytest.raises(OptionError, match="packed weights are copies"),
        serving(base, variants, tmp_path, replace(SMALL, weights="packed", policy="swap")),
    ):
        pass


@pytest.mark.parametrize(("policy", "weights"), [("mixed", "plain"), ("swap", "plain"), ("mixed", "int8")])
def test_bfloat16_says_what_the_same_weights_in_float32_say_within_its_rounding(
    tmp_path: Path, policy: str, weights: str
) -> None:
    """By margin: a token must be nearly as likely as the likeliest, as bfloat16 differs with the batch's shape."""
    base = tiny_llama(attention_bias=True)
    variants = {kind: random_variant(base, kind, seed, scale=0.1) for seed, kind in enumerate(KINDS, start=1)}
    rounded = deepcopy(base).bfloat16().float()
    own = spelled_out(rounded) if weights == "int8" else rounded
    models = {None: own} | {kind: with_deltas(base, own, variant.merged) for kind, variant in variants.items()}
    names = [None, *KINDS]
    prompts = random_prompts(18, seed=3, longest=40)
    owners = [names[i % len(names)] for i in range(len(prompts))]
    limits = replace(SMALL, dtype="bfloat16", policy=policy, weights=weights, bank_slots=6)
    with serving(base, variants, tmp_path, limits) as engine:
        given = answers(engine, prompts, owners)
    lost = [behind(models[owner], prompt, tokens) for owner, prompt, tokens in zip(owners, prompts, given, strict=True)]
    wrong = [
        behind(models[names[i % 2 - 2]], prompt, tokens)
        for i, (prompt, tokens) in enumerate(zip(prompts, given, strict=True))
    ]
    assert max(lost) < 0.06
    assert max(wrong) > 0.3


def behind(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> float:
    """How far these tokens' logits lie behind the best, at most, in standard deviations of the logits."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    chosen = logits[torch.arange(len(tokens)), torch.tensor(tokens)]
    return float(((logits.max(1).values - chosen) / logits.std(1)).max())


def test_a_kind_of_weights_that_is_unknown_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(OptionError, match=r"'int4'; known are plain, int8, packed"),
        serving(BASES["tied"], {}, tmp_path, replace(SMALL, weights="int4")),
    ):
        pass
