"""What each method keeps: how much, unbiased, the same for one seed; and what is never pruned."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny_deltas import NAME, decoded, encoded, profile, tensor_delta, wanted
from torch import Tensor

from deltaserve.delta_store.codec.specs import DenseSpec, LowRankSpec, RowsSpec, SparseSpec, XorSpec
from deltaserve.delta_store.delta import TensorDelta
from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.fine_tune import Change
from deltaserve.delta_store.pruning.methods import KEPT, METHODS, method
from deltaserve.delta_store.pruning.options import BLOCKS, CODECS, Value
from deltaserve.delta_store.pruning.weights import BaseFacts
from deltaserve.kernels.parts import Delta
from deltaserve.kernels.reference import unpack

PRUNING = ["weighted", "dare", "darex"]


@pytest.mark.parametrize("name", PRUNING)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_keeps_exactly_its_columns(name: str, block: int) -> None:
    """133 rows: no block divides them."""
    (spec, part), *_ = encoded(name, tensor_delta(133, 63), drop=0.9, block=block, codec="float32")
    assert isinstance(spec, SparseSpec)
    assert (spec.kept, spec.block, spec.mask) == (6, block, "weighted" if name == "weighted" else "uniform")
    kept = unpack(Delta(spec.shape, (part,))) != 0
    assert (kept.sum(1) == 6).all()
    for rows in kept.split(block):
        assert (rows == rows[0]).all()


@pytest.mark.parametrize("name", PRUNING)
def test_survivors_are_the_delta_divided_by_their_probability(name: str) -> None:
    delta = tensor_delta(64, 64)
    (_, part), *_ = parts = encoded(name, delta, drop=0.75, block=4, codec="float32")
    sparse = decoded(parts)
    kept = sparse != 0
    torch.testing.assert_close(sparse[kept], (wanted(delta) * part.factors)[kept])
    if name == "dare":
        assert (part.factors == 4).all()


@pytest.mark.parametrize("name", PRUNING)
def test_the_mean_of_many_seeds_is_the_delta(name: str) -> None:
    """Within a block columns are drawn together, so many blocks are looked at."""
    delta, draws = tensor_delta(128, 48), 300
    options: dict[str, Value] = {"drop": 0.7, "block": 1, "codec": "float32"}
    sparse = torch.stack([decoded(encoded(name, delta, **options, seed=seed)) for seed in range(draws)])
    error = (sparse.mean(0) - wanted(delta)) / (sparse.std(0) / draws**0.5).clamp(min=1e-7)
    assert error.square().mean() < 1.5
    assert error.abs().max() < 6


@pytest.mark.parametrize("name", PRUNING)
def test_quantised_survivors_keep_their_projection(name: str) -> None:
    delta = tensor_delta(64, 128)
    exact = decoded(encoded(name, delta, drop=0.75, codec="float32"))
    for codec in CODECS:
        (spec, part), *_ = parts = encoded(name, delta, drop=0.75, codec=codec)
        assert spec.codec == part.values.codec == codec
        values, survivors = decoded(parts) / part.factors, exact / part.factors
        assert (values * survivors).sum() == pytest.approx(survivors.square().sum().item(), rel=0.01)


@pytest.mark.parametrize("name", PRUNING)
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(name: str) -> None:
    def draw(seed: int) -> Tensor:
        return decoded(encoded(name, tensor_delta(32, 64), drop=0.9, seed=seed))

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_heavier_columns_are_kept_more_often() -> None:
    delta, weights = tensor_delta(1600, 64), profile(64).weights(NAME)
    (_, part), *_ = encoded("weighted", delta, drop=0.9, block=1, codec="float32")
    counts = torch.bincount(part.columns.flatten().long(), minlength=64)
    assert torch.corrcoef(torch.stack([counts.float(), weights.float()]))[0, 1] > 0.98


def test_a_weight_that_the_profile_lacks_is_dropped_uniformly() -> None:
    row = method("weighted")
    change = Change("other.weight", False, lambda: tensor_delta(32, 64))
    ((spec, _),) = row.function(change, row.options({}), BaseFacts(profile(64)))
    assert isinstance(spec, SparseSpec)
    assert spec.mask == "uniform"


@pytest.mark.parametrize("name", PRUNING)
def test_a_transposed_linear_is_encoded_as_out_by_in(name: str) -> None:
    delta = tensor_delta(32, 96, transposed=True)
    parts = encoded(name, delta, drop=0.0, codec="float32")
    assert (parts[0][0].shape, parts[0][0].transposed) == ((96, 32), True)
    torch.testing.assert_close(decoded(parts), wanted(delta).T)


@pytest.mark.parametrize(("shape", "block"), [((40,), 1), ((15, 64), 16), ((64, 20), 1)])
def test_vectors_and_small_weights_are_kept_whole(shape: tuple[int, ...], block: int) -> None:
    """15 rows are less than a block of 16; of 20 columns 2 % are none."""
    delta = tensor_delta(*shape)
    ((spec, _),) = parts = encoded("dare", delta, drop=0.98, block=block)
    assert isinstance(spec, DenseSpec)
    assert torch.equal(decoded(parts), wanted(delta).bfloat16().float())


def test_embeddings_are_low_rank_beside_their_mean() -> None:
    base, fine = tensor_delta(64, 32).raw
    direction = torch.linspace(-1, 1, 64)[:, None] * torch.linspace(0.2, 1, 32)
    delta = TensorDelta(NAME, (base, base + 0.3 + direction))
    parts = encoded("dare", delta, [NAME], rank=1)
    assert [type(spec) for spec, _ in parts] == [RowsSpec, LowRankSpec]
    torch.testing.assert_close(decoded(parts), wanted(delta), atol=0.02, rtol=0)
    assert fine.shape == (64, 32)


def test_rank_zero_keeps_the_mean_row_alone() -> None:
    delta = tensor_delta(64, 32)
    parts = encoded("weighted", delta, [NAME], rank=0)
    assert [type(spec) for spec, _ in parts] == [RowsSpec]
    torch.testing.assert_close(decoded(parts), wanted(delta).mean(0).expand(64, 32))


@pytest.mark.parametrize(("dtype", "codec"), [(torch.float32, "float32"), (torch.bfloat16, "bf16")])
def test_a_vocab_grown_rows_are_stored_in_full(dtype: torch.dtype, codec: str) -> None:
    delta = tensor_delta(64, 32, added=3, dtype=dtype)
    parts = encoded("weighted", delta, [NAME])
    assert isinstance(parts[0][0], RowsSpec)
    assert (parts[0][0].codec, parts[0][0].count, parts[0][0].shape) == (codec, 3, (67, 32))
    assert torch.equal(decoded(parts)[64:], delta.fine[64:])


def test_lora_keeps_an_adapters_factors_exactly() -> None:
    a, b = torch.randn(4, 32), torch.randn(48, 4)
    delta = tensor_delta(48, 32)
    for factors, codec in (((a, b), "float32"), ((a.bfloat16().float(), b.bfloat16().float()), "bf16")):
        change = Change(NAME, False, lambda: delta, factors)
        facts = BaseFacts(None, frozenset([NAME]))
        ((spec, part),) = method("lora").function(change, method("lora").options({}), facts)
        assert isinstance(spec, LowRankSpec)
        assert (spec.codec, spec.rank) == (codec, 4)
        torch.testing.assert_close(decoded([(spec, part)]), factors[1] @ factors[0])


def test_lora_keeps_what_was_trained_in_full_exactly() -> None:
    delta = tensor_delta(40)
    ((spec, part),) = encoded("lora", delta)
    assert torch.equal(decoded([(spec, part)]), wanted(delta))


def test_lossless_is_one_xor_part() -> None:
    ((spec, _),) = encoded("lossless", tensor_delta(64, 32, added=3, dtype=torch.bfloat16))
    assert spec == XorSpec(shape=(67, 32), dtype="bfloat16")


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "best",
            {},
            "known are: weighted, dare, darex, magnitude, wanda, structural, low-rank, .*, lora, lora-darex, lossless",
        ),
        ("lossless", {"drop": 0.5}, "takes: no options"),
        ("dare", {"divisor": 2}, "no option divisor; it takes: drop, block, codec, seed, rank"),
        ("dare", {"drop": 1.0}, "below 1"),
        ("dare", {"drop": -0.1}, "from 0"),
        ("dare", {"drop": float("nan")}, "fraction"),
        ("dare", {"block": 3}, "1, 4, 8, 16, 32, 64"),
        ("dare", {"codec": "int3"}, "known are: float32, bf16, int8, int4, int2, sign"),
        ("dare", {"seed": -1}, "2\\*\\*63"),
        ("dare", {"rank": 1000}, "256"),
    ],
)
def test_what_is_unknown_or_out_of_range_is_refused(name: str, given: dict[str, Value], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        method(name).options(given)


def test_every_row_of_the_table_says_what_it_is() -> None:
    for name, row in METHODS.items():
        assert row.name == name
        assert row.function.__doc__
        assert "arXiv" in row.source
        assert row.options({}) is not None


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if "rank" in row.defaults])
def test_what_is_not_pruned_is_stored_in_the_codecs_asked_for(name: str) -> None:
    """Norms are near what they were, and embeddings near what the same directions are in float32."""
    norm, table = tensor_delta(130), tensor_delta(64, 32)
    ((spec, _),) = parts = encoded(name, norm, whole_codec="int8")
    assert isinstance(spec, DenseSpec)
    assert spec.codec == "int8"
    torch.testing.assert_close(decoded(parts), wanted(norm), atol=1e-3, rtol=0)
    fine = decoded(encoded(name, table, embeddings=[NAME], rank=3, embedding_codec="float32"))
    _, (spec, _) = coarse = encoded(name, table, embeddings=[NAME], rank=3, embedding_codec="int4")
    assert isinstance(spec, LowRankSpec)
    assert spec.codec == "int4"
    assert 0 < (decoded(coarse) - fine).norm() < 0.2 * fine.norm()


def test_every_method_has_a_card_with_its_defaults() -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    for name, row in METHODS.items():
        card = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for heading in ("Concept", "When to use", "Inputs", "Parameters", "Paper"):
            assert f"**{heading}.**" in card
        own = listed({option: value for option, value in row.defaults.items() if option not in KEPT})
        defaults = f"{own}, and what is kept" if "rank" in row.defaults else own or "none"
        assert f"[`{name}`](#{name})" in text
        assert f"| {defaults} |" in text
    assert f"*What is kept*: {listed(KEPT)}" in text


def listed(defaults: Mapping[str, Value]) -> str:
    return ", ".join(f"`{option}` ({value})" for option, value in defaults.items())
