"""Delta-aware layers by themselves: what they do to rows of variants, and that they leave the base's alone."""

from copy import deepcopy

import pytest
import torch
from engine_variants import random_variant
from tiny_models import tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from deltaserve.delta_store.errors import UnsupportedArtifact
from deltaserve.kernels import reference
from deltaserve.kernels.codes import float_codes
from deltaserve.kernels.parts import Delta, Dense
from deltaserve.kernels.segments import BASE
from deltaserve.server.engine.layers import DeltaEmbedding, DeltaHead, DeltaLinear, become, twin_of, unite
from deltaserve.server.engine.norms import DeltaNorm
from deltaserve.server.engine.routing import Routing, Rows
from deltaserve.server.engine.wrapped import VersionDeltas, WrappedModel

ROWS = 7
LENGTHS, SLOTS = (2, 1, 3, 1), (0, BASE, 1, 0)
OF_BASE = [2]


def routing() -> Routing:
    routing = Routing()
    routing.tokens.assign(LENGTHS, SLOTS)
    return routing


def dense(*shape: int, seed: int = 0) -> tuple[Delta, Tensor]:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return Delta(shape, (Dense(shape, float_codes(values)),)), values


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: Conv1D(5, 6)], ids=["linear", "conv1d"])
def test_a_linear_adds_weight_and_bias_to_rows_of_variants_only(make) -> None:  # type: ignore[no-untyped-def]
    module, x = make(), torch.randn(1, ROWS, 6)
    weight, weight_values = dense(5, 6)
    bias, bias_values = dense(5)
    before, rows = module(x), Rows()
    become(module, DeltaLinear, rows, 2, reference)
    unite([module], 2, reference)
    plain = module(x)
    torch.testing.assert_close(plain, before)
    rows.assign(LENGTHS, SLOTS)
    module.install("weight", 0, module.prepare(weight, reference.prepare))
    module.install("bias", 1, module.prepare(bias, reference.prepare))
    y = module(x)
    assert torch.equal(y[0, OF_BASE], plain[0, OF_BASE])
    torch.testing.assert_close(y[0, [0, 1, 6]], plain[0, [0, 1, 6]] + x[0, [0, 1, 6]] @ weight_values.T)
    torch.testing.assert_close(y[0, 3:6], plain[0, 3:6] + bias_values)


NORMS = {
    "llama": lambda: LlamaRMSNorm(8),
    "gemma": lambda: Gemma2RMSNorm(8),
    "layer": lambda: nn.LayerNorm(8),
    "layer without bias": lambda: nn.LayerNorm(8, bias=False),
    "rms": lambda: nn.RMSNorm(8),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(), (3,)], ids=["rows", "rows and heads"])
def test_a_norm_of_any_family_is_the_merged_norm_bit_for_bit(
    name: str, dtype: torch.dtype, heads: tuple[int, ...]
) -> None:
    norm = NORMS[name]().to(dtype)
    x = torch.randn(1, ROWS, *heads, 8, dtype=dtype)
    delta, values = dense(8)
    merged = deepcopy(norm)
    with torch.no_grad():
        merged.weight.copy_(merged.weight.float() + values)
    plain = norm(x)
    assert twin_of(norm) is DeltaNorm
    become(norm, DeltaNorm, routing().tokens, 2, reference)
    norm.install("weight", 1, norm.prepare(delta))
    y = norm(x)
    assert torch.equal(y[0, [0, 1, 2, 6]], plain[0, [0, 1, 2, 6]])
    assert torch.equal(y[0, 3:6], merged(x)[0, 3:6])
    norm.install("weight", 1, None)
    assert torch.equal(norm(x), plain)


def test_most_norms_run_all_rows_at_once() -> None:
    at_once = {}
    for name, make in NORMS.items():
        norm = make()
        become(norm, DeltaNorm, routing().tokens, 2, reference)
        at_once[name] = norm.takes_a_vector_each_row
    assert at_once["llama"]
    assert at_once["gemma"]
    assert not at_once["layer"]


def test_root_mean_square_norms_are_known_by_what_they_compute() -> None:
    formulas = {}
    for name, make in NORMS.items():
        norm = make()
        become(norm, DeltaNorm, routing().tokens, 2, reference)
        formulas[name] = norm.formula
    assert formulas["llama"] == (1e-6, 0)
    assert formulas["gemma"] == (1e-6, 1)
    assert formulas["layer"] is None


def test_without_variants_in_the_step_a_layer_is_the_base() -> None:
    rows = Routing().tokens
    rows.assign([3, 4], [BASE, BASE])
    modules = {DeltaLinear: nn.Linear(4, 4), DeltaHead: nn.Linear(4, 4), DeltaNorm: LlamaRMSNorm(4)}
    for twin, module in modules.items():
        x = torch.randn(1, ROWS, 4)
        plain = module(x)
        become(module, twin, rows, 1, reference)
        if isinstance(module, DeltaLinear):
            unite([module], 1, reference)
        assert torch.equal(module(x), plain)
    embedding = nn.Embedding(9, 4)
    become(embedding, DeltaEmbedding, rows, 1, reference)
    assert embedding(torch.arange(7)[None]).shape == (1, 7, 4)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_wrapping_keeps_names_parameters_and_values_in_one_run_of_memory(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    before = dict(model.named_parameters(remove_duplicate=False))
    values = {name: parameter.clone() for name, parameter in before.items()}
    wrapped = WrappedModel(model, Routing(), 2, reference, tied=True)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert set(wrapped.shapes) == set(before)
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)
    conv1d = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    assert conv1d == {name for name in after if not after[name].is_contiguous()}  # [in, out] lies there as [out, in]
    places = {parameter.data_ptr(): parameter.nbytes for parameter in after.values()}  # head and embedding are one
    assert max(places) + places[max(places)] - min(places) <= sum(places.values()) + 64 * len(places)


def test_deltas_without_a_place_are_refused_by_name() -> None:
    base = tiny_llama()
    grown = random_variant(base, "rows", seed=1, vocab=67).deltas
    wrapped = WrappedModel(base, Routing(), 2, reference, tied=True)
    with pytest.raises(UnsupportedArtifact, match=r"model\.layers\.9\.mlp\.weight"):
        wrapped.check({"model.layers.9.mlp.weight": (3, 3), "model.norm.weight": (32,)})
    with pytest.raises(UnsupportedArtifact, match=r"q_proj\.weight has shape \[40, 32\].*\[32, 32\]"):
        wrapped.check({"model.layers.0.self_attn.q_proj.weight": (40, 32)})
    with pytest.raises(UnsupportedArtifact, match="both must grow"):
        wrapped.fit(VersionDeltas(grown.items(), tied_head=False))
