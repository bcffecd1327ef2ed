"""Structural drop: whole rows, columns and heads, as many as asked for, unbiased."""

import pytest
import torch
from tiny_deltas import decoded, encoded, profile, tensor_delta, wanted
from torch import Tensor

from deltaserve.delta_store.codec.specs import DenseSpec, RowsSpec, SparseSpec
from deltaserve.delta_store.delta import TensorDelta
from deltaserve.delta_store.fine_tune import Change
from deltaserve.delta_store.pruning.methods import method
from deltaserve.delta_store.pruning.options import Value
from deltaserve.delta_store.pruning.weights import BaseFacts


def kept_lines(values: Tensor, axis: int) -> Tensor:
    """Indices of the rows or columns that are kept; each is kept whole or not at all."""
    kept = values != 0
    lines = kept.any(1 - axis)
    assert torch.equal(lines, kept.all(1 - axis))
    return lines.nonzero().flatten()


@pytest.mark.parametrize(("unit", "axis", "kind"), [("rows", 0, RowsSpec), ("columns", 1, SparseSpec)])
def test_whole_lines_are_kept_and_divided_by_their_probability(unit: str, axis: int, kind: type) -> None:
    """Of 133 rows 13 are kept, one from each stratum of 10 or 11; of 63 columns 6."""
    delta = tensor_delta(133, 63)
    ((spec, _),) = parts = encoded("structural", delta, unit=unit, drop=0.9, codec="float32")
    assert isinstance(spec, kind)
    values = decoded(parts)
    lines, count = kept_lines(values, axis), (133, 63)[axis]
    assert len(lines) == round(0.1 * count)
    ratios = (values / wanted(delta)).index_select(axis, lines)
    strata = {(i + 1) * count // len(lines) - i * count // len(lines) for i in range(len(lines))}
    assert {round(ratio) for ratio in ratios.flatten().tolist()} <= strata
    torch.testing.assert_close(ratios, ratios.round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("unit", ["rows", "columns"])
def test_the_mean_of_many_seeds_is_the_delta(unit: str) -> None:
    delta, draws = tensor_delta(24, 32), 800
    options: dict[str, Value] = {"unit": unit, "drop": 0.75, "codec": "float32"}
    drawn = torch.stack([decoded(encoded("structural", delta, **options, seed=seed)) for seed in range(draws)])
    error = (drawn.mean(0) - wanted(delta)) / (drawn.std(0) / draws**0.5).clamp(min=1e-7)
    assert error.square().mean() < 1.5
    assert error.abs().max() < 6


def of_layer(layer: str, delta: TensorDelta, drop: float = 0.5) -> list[object]:
    row = method("structural")
    options = row.options({"unit": "heads", "drop": drop, "codec": "float32"})
    change = Change(layer, delta.transposed, lambda: TensorDelta(layer, delta.raw, delta.transposed))
    return list(row.function(change, options, BaseFacts(profile(32), head_size=8)))  # type: ignore[arg-type]


def test_heads_are_rows_of_queries_and_columns_of_the_output() -> None:
    """Four heads of 8; queries and output keep the same ones, keys and values with two heads their own."""
    square, narrow = tensor_delta(32, 32), tensor_delta(16, 32)
    kept = {}
    for name, delta, axis in (("q", square, 0), ("o", square, 1), ("k", narrow, 0), ("v", narrow, 0)):
        lines = kept_lines(decoded(of_layer(f"layers.0.self_attn.{name}_proj.weight", delta)), axis)  # type: ignore[arg-type]
        heads = sorted({line // 8 for line in lines.tolist()})
        assert lines.tolist() == [8 * head + i for head in heads for i in range(8)]
        kept[name] = heads
    assert kept["q"] == kept["o"]
    assert kept["k"] == kept["v"]
    assert (len(kept["q"]), len(kept["k"])) == (2, 1)


def test_outside_attention_heads_are_rows() -> None:
    values = decoded(of_layer("layers.0.mlp.up_proj.weight", tensor_delta(32, 32)))  # type: ignore[arg-type]
    assert len(kept_lines(values, 0)) == 16


def test_a_fused_transposed_attention_keeps_heads() -> None:
    """GPT-2 stores queries, keys and values as one [in, 3 * out]."""
    delta = tensor_delta(32, 96, transposed=True)
    lines = kept_lines(decoded(of_layer("h.0.attn.c_attn.weight", delta)), 0)  # type: ignore[arg-type]
    assert len(lines) == 48
    assert {line // 8 for line in lines.tolist()} == {line // 8 for line in lines.tolist()[::8]}


def test_too_few_to_keep_one_is_kept_whole() -> None:
    ((spec, _),) = encoded("structural", tensor_delta(4, 64), drop=0.9)
    assert isinstance(spec, DenseSpec)


def test_the_same_seed_keeps_the_same_rows() -> None:
    def draw(seed: int) -> Tensor:
        return decoded(encoded("structural", tensor_delta(64, 32), drop=0.9, seed=seed))

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
