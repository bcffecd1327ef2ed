"""Low rank, dense, and both with a residual: near the delta, and unbiased where a draw completes them."""

import pytest
import torch
from tiny_deltas import NAME, decoded, encoded, profile, tensor_delta, wanted

from deltaserve.delta_store.codec.specs import DenseSpec, LowRankSpec, SparseSpec
from deltaserve.delta_store.delta import TensorDelta
from deltaserve.delta_store.fine_tune import Change
from deltaserve.delta_store.pruning.methods import method
from deltaserve.delta_store.pruning.options import Value
from deltaserve.delta_store.pruning.weights import BaseFacts


def product_delta(rank: int, out: int = 48, width: int = 64) -> TensorDelta:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
    base = torch.randn(out, width, generator=generator)
    return TensorDelta(NAME, (base, base + b @ a))


def test_low_rank_finds_a_product_again() -> None:
    delta = product_delta(3)
    ((spec, _),) = parts = encoded("low-rank", delta, linear_rank=3)
    assert isinstance(spec, LowRankSpec)
    assert spec.rank == 3
    error = (decoded(parts) - wanted(delta)).norm() / wanted(delta).norm()
    assert error < 0.02  # int8


def test_low_rank_keeps_what_strong_inputs_see() -> None:
    """Its error on inputs of the profile's strengths is below a plain SVD's, and near the least possible."""
    delta, strength = tensor_delta(48, 64), profile(64).weights(NAME).float()
    row = method("low-rank")
    change = Change(NAME, False, lambda: delta)
    plain = list(row.function(change, row.options({"linear_rank": 4}), BaseFacts()))
    aware = encoded("low-rank", delta, linear_rank=4)
    errors = [((decoded(parts) - wanted(delta)) * strength).norm() for parts in (plain, aware)]
    least = torch.linalg.svdvals(wanted(delta) * strength)[4:].norm()
    assert least * 0.999 < errors[1] < 1.02 * least
    assert errors[1] < 0.98 * errors[0]


def test_low_rank_is_cut_to_the_smaller_side() -> None:
    ((spec, _),) = encoded("low-rank", tensor_delta(5, 64), linear_rank=8)
    assert isinstance(spec, LowRankSpec)
    assert spec.rank == 5


@pytest.mark.parametrize("codec", ["sign", "int2", "int4", "int8"])
def test_dense_keeps_every_rows_projection(codec: str) -> None:
    delta = tensor_delta(40, 64)
    ((spec, part),) = parts = encoded("dense", delta, codec=codec)
    assert isinstance(spec, DenseSpec)
    assert (spec.codec, spec.group, len(part.values.scales)) == (codec, 64, 40)  # type: ignore[union-attr]
    products, energies = (decoded(parts) * wanted(delta)).sum(1), wanted(delta).square().sum(1)
    torch.testing.assert_close(products, energies, rtol=0.005, atol=0)  # the scales are bfloat16


def test_one_bit_is_the_sign_times_a_number_a_row() -> None:
    delta = tensor_delta(8, 64)
    values = decoded(encoded("dense", delta))
    assert torch.equal(values.sign(), wanted(delta).sign())
    assert (values.abs() == values.abs()[:, :1]).all()


def test_with_a_residual_low_rank_is_unbiased() -> None:
    """The directions are the same for every seed; the mean of the sums over the seeds is the delta."""
    delta, draws = tensor_delta(64, 32), 80
    options: dict[str, Value] = {"drop": 0.7, "block": 1, "codec": "float32", "linear_rank": 2}
    parts = [encoded("low-rank-residual", delta, **options, seed=seed) for seed in range(draws)]
    assert [type(spec) for spec, _ in parts[0]] == [LowRankSpec, SparseSpec]
    assert all(torch.equal(decoded(drawn[:1]), decoded(parts[0][:1])) for drawn in parts)
    sums = torch.stack([decoded(drawn) for drawn in parts])
    remainder = wanted(delta) - decoded(parts[0][:1])
    spread = remainder.abs() * ((parts[0][1][1].factors - 1) / draws).sqrt()  # type: ignore[union-attr]
    error = (sums.mean(0) - wanted(delta)) / spread.clamp(min=1e-5)
    assert error.square().mean() < 1.5


def test_with_a_residual_one_bit_is_nearer_to_the_delta() -> None:
    """What is drawn is in one bit too, so single values keep some of their error."""
    delta, draws = tensor_delta(64, 32), 80
    parts = [encoded("dense-residual", delta, drop=0.5, block=1, seed=seed) for seed in range(draws)]
    assert [type(spec) for spec, _ in parts[0]] == [DenseSpec, SparseSpec]
    mean = torch.stack([decoded(drawn) for drawn in parts]).mean(0)
    assert (mean - wanted(delta)).norm() < 0.75 * (decoded(parts[0][:1]) - wanted(delta)).norm()


def test_a_low_rank_before_the_draw_leaves_less_to_chance() -> None:
    delta = product_delta(2)
    with_rank = decoded(encoded("low-rank-residual", delta, linear_rank=2, drop=0.8, block=1, codec="int8"))
    alone = decoded(encoded("weighted", delta, drop=0.8, block=1, codec="int8"))
    assert (with_rank - wanted(delta)).norm() < 0.1 * (alone - wanted(delta)).norm()


@pytest.mark.parametrize("name", ["low-rank", "dense", "low-rank-residual", "dense-residual"])
def test_a_transposed_linear_is_encoded_as_out_by_in(name: str) -> None:
    delta = tensor_delta(32, 96, transposed=True)
    parts = encoded(name, delta)
    assert {(spec.shape, spec.transposed) for spec, _ in parts} == {((96, 32), True)}
    products = (decoded(parts) * wanted(delta).T).sum()
    assert products > 0.1 * wanted(delta).square().sum()
