"""Magnitude and Wanda: which columns are kept, and that survivors make up for what is not."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_deltas import NAME, decoded, encoded, profile, tensor_delta, wanted
from tiny_models import fine_tuned, save, tiny_gpt2, tiny_llama
from torch import Tensor

from deltaserve.delta_store.calibration import calibration_samples
from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.codec.specs import DenseSpec, SparseSpec
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.delta import TensorDelta
from deltaserve.delta_store.fine_tune import Change, open_fine_tune
from deltaserve.delta_store.pruning.layer_inputs import look_at_inputs
from deltaserve.delta_store.pruning.methods import method
from deltaserve.delta_store.pruning.options import BLOCKS, CODECS, Value
from deltaserve.delta_store.pruning.tuning import TUNING_TOKENS, survivors
from deltaserve.delta_store.pruning.weights import BaseFacts
from deltaserve.delta_store.running.weights import of_fine_tune
from deltaserve.delta_store.running.whole import Whole
from deltaserve.kernels.parts import Sparse
from deltaserve.kernels.reference import unpack

METHODS = ["magnitude", "wanda"]


def strengths(name: str, width: int) -> Tensor:
    return profile(width).weights(NAME).double() if name == "wanda" else torch.ones(width, dtype=torch.float64)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_keeps_its_most_important_columns(name: str, block: int) -> None:
    """133 rows: no block divides them."""
    delta = tensor_delta(133, 63)
    ((spec, part),) = encoded(name, delta, drop=0.9, block=block, codec="float32")
    assert isinstance(spec, SparseSpec)
    assert isinstance(part, Sparse)
    assert (spec.mask, spec.kept, spec.seed) == ("explicit", 6, None)
    for columns, rows in zip(part.columns, wanted(delta).split(block), strict=True):
        importance = (rows.double() * strengths(name, 63)).square().sum(0)
        assert set(columns.tolist()) == set(importance.topk(6).indices.tolist())


@pytest.mark.parametrize(("block", "codec"), [(1, "float32"), (16, "float32"), (1, "int4"), (16, "sign")])
def test_a_blocks_product_with_the_delta_is_the_deltas_own(block: int, codec: str) -> None:
    delta = tensor_delta(64, 96)
    sparse = decoded(encoded("magnitude", delta, drop=0.75, block=block, codec=codec))
    products = (sparse.double() * wanted(delta).double()).sum(1).view(-1, block).sum(1)
    energies = wanted(delta).double().square().sum(1).view(-1, block).sum(1)
    tolerance = 1e-5 if codec == "float32" else 0.35
    torch.testing.assert_close(products, energies, rtol=tolerance, atol=0)
    assert products.sum().item() == pytest.approx(energies.sum().item(), rel=1e-5 if codec == "float32" else 0.02)


def test_survivors_of_a_block_are_enlarged_by_one_number() -> None:
    delta = tensor_delta(32, 64)
    sparse = decoded(encoded("magnitude", delta, drop=0.75, block=4, codec="float32"))
    for values, originals in zip(sparse.split(4), wanted(delta).split(4), strict=True):
        kept = values != 0
        ratios = values[kept] / originals[kept]
        assert ratios.min() > 1
        torch.testing.assert_close(ratios, ratios.mean().expand(len(ratios)))


@pytest.mark.parametrize("name", METHODS)
def test_with_nothing_dropped_it_is_the_delta(name: str) -> None:
    for transposed in (False, True):
        delta = tensor_delta(32, 96, transposed=transposed)
        parts = encoded(name, delta, drop=0.0, codec="float32")
        assert parts[0][0].transposed == transposed
        torch.testing.assert_close(decoded(parts), wanted(delta).T if transposed else wanted(delta))


@pytest.mark.parametrize("name", METHODS)
def test_every_codec_stores_the_same_columns(name: str) -> None:
    delta = tensor_delta(32, 64)
    columns = [encoded(name, delta, drop=0.9, block=8, codec=codec)[0][1].columns for codec in CODECS]  # type: ignore[union-attr]
    assert all(torch.equal(columns[0], other) for other in columns)


def test_equal_columns_are_kept_from_the_left() -> None:
    base = torch.zeros(16, 40)
    ((_, part),) = encoded("magnitude", TensorDelta(NAME, (base, base + 1)), drop=0.9, block=16)
    assert isinstance(part, Sparse)
    assert part.columns.tolist() == [[0, 1, 2, 3]]


def test_rows_that_did_not_change_stay_unchanged() -> None:
    base, fine = tensor_delta(32, 64).raw
    fine[16:] = base[16:]
    sparse = decoded(encoded("magnitude", TensorDelta(NAME, (base, fine)), drop=0.9, block=16, codec="int4"))
    assert (sparse[16:] == 0).all()
    assert (sparse[:16] != 0).any()


def test_a_weight_that_the_profile_lacks_is_pruned_by_magnitude() -> None:
    delta, row = tensor_delta(32, 64), method("wanda")
    change = Change("other.weight", False, lambda: delta)
    ((_, part),) = row.function(change, row.options({"block": 1}), BaseFacts(profile(64)))
    ((_, other),) = encoded("magnitude", delta, block=1)
    assert torch.equal(part.columns, other.columns)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", METHODS)
def test_small_weights_are_kept_whole(name: str) -> None:
    ((spec, _),) = encoded(name, tensor_delta(15, 64), block=16)
    assert isinstance(spec, DenseSpec)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_wandas_outputs_are_unbiased_on_the_text(make: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """<decoded x, delta x> = <delta x, delta x>, with the inputs that each layer of the full fine-tune sees."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, tuned = save(make(), tmp_path / "base", vocab=64), fine_tuned(make())
    fine = save(tuned, tmp_path / "fine", vocab=64)
    options: dict[str, Value] = {"drop": 0.7, "block": 8, "codec": "float32"}
    receipt = compress(base, fine, tmp_path / "out", method="wanda", options=options)
    artifact, checkpoint = open_artifact(tmp_path / "out"), open_checkpoint(base)
    samples = calibration_samples(checkpoint, None, TUNING_TOKENS, fine)
    products, energies = Counter[str](), Counter[str]()

    def look(name: str, x: Tensor, delta: Tensor) -> None:
        wanted = x @ delta
        products[name] += (x @ unpack(artifact.delta(name)).T * wanted).sum().item()
        energies[name] += wanted.square().sum().item()

    names = survivors(artifact)
    with torch.no_grad():
        run = partial(Whole().run, of_fine_tune(open_fine_tune(fine, checkpoint)))
        look_at_inputs(run, checkpoint, names, samples, look)
    assert len(names) > 4
    assert products == pytest.approx(energies, rel=1e-3)
    assert receipt.q is not None
    assert receipt.q[1] < 1
