"""An adapter's factors pruned each for itself: through bytes, unbiased, tuned as a product, bounded when decoded."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from tiny_deltas import tensor_delta
from tiny_models import save, tiny_llama
from torch import Tensor

from deltaserve.delta_store.codec import parts
from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.codec.specs import FactorsSpec
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.errors import CorruptArtifact
from deltaserve.delta_store.fine_tune import Change
from deltaserve.delta_store.inspect import inspect
from deltaserve.delta_store.pruning.methods import METHODS
from deltaserve.delta_store.pruning.options import CODECS, Value
from deltaserve.delta_store.pruning.tuning import divided
from deltaserve.delta_store.pruning.weights import BaseFacts
from deltaserve.delta_store.pruning.whole import Encoded
from deltaserve.kernels.codes import decode
from deltaserve.kernels.parts import Delta, LowRank
from deltaserve.kernels.reference import unpack

NAME = "layer.weight"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def factors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(4, 32, generator=generator), torch.randn(24, 4, generator=generator)


def encoded(**options: Value) -> Encoded:
    change, row = Change(NAME, False, lambda: tensor_delta(24, 32), factors()), METHODS["lora-darex"]
    (result,) = row.function(change, row.options(options), BaseFacts())
    return result


def bytes_of(encoded: Encoded) -> Tensor:
    return torch.frombuffer(bytearray(parts.encode(encoded[1], encoded[0])), dtype=torch.uint8)


def product(encoded: Encoded) -> Tensor:
    """What a reader of its bytes gets."""
    part = parts.decode(bytes_of(encoded), encoded[0], NAME, None, None)
    assert isinstance(part, LowRank)
    return unpack(Delta(part.shape, (part,)))


@pytest.mark.parametrize("codec", CODECS)
def test_with_nothing_dropped_it_is_the_product_in_the_codecs_precision(codec: str) -> None:
    a, b = factors()
    error = (product(encoded(drop=0.0, codec=codec)) - b @ a).norm() / (b @ a).norm()
    assert error < {"float32": 1e-6, "bf16": 0.01, "int8": 0.02, "int4": 0.3, "int2": 0.8, "sign": 1.5}[codec]


def test_factors_are_unbiased_over_the_seeds() -> None:
    a, b = factors()
    draws = torch.stack([product(encoded(seed=seed, codec="float32")) for seed in range(200)])
    error = (draws.mean(0) - b @ a) / (draws.std(0) / len(draws) ** 0.5)
    assert error.square().mean() < 1.5
    assert error.abs().max() < 6


def test_tuning_divides_the_product() -> None:
    before = encoded(codec="float32")
    ((name, spec, part),) = divided([(NAME, *before)], {NAME: 1.25})
    assert name == NAME
    torch.testing.assert_close(product((spec, part)), product(before) / 1.25)
    ((_, *untouched),) = divided([(NAME, *before)], {"another.weight": 2.0})
    assert torch.equal(product((untouched[0], untouched[1])), product(before))


def test_bytes_that_do_not_fit_are_refused() -> None:
    spec, _ = result = encoded()
    with pytest.raises(CorruptArtifact, match="a factors part has"):
        parts.decode(bytes_of(result)[:-1], spec, NAME, None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 1 << 10, "shape": (1 << 19, 1 << 19)}, "factors of rank 1024 for .* exceed 67108864 numbers"),
        ({"kept_a": 33}, "33 columns cannot be kept of 32"),
        ({"kept_b": 25}, "25 columns cannot be kept of 24"),
        ({"mask": "weighted"}, "Extra inputs"),
    ],
)
def test_specifications_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    spec, _ = encoded()
    with pytest.raises(ValidationError, match=message):
        FactorsSpec.model_validate({**spec.model_dump(), **change})


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_an_adapters_factors_are_pruned_each_for_itself(drop: float, tmp_path: Path) -> None:
    """Nothing dropped and in float32, they are its own; half of both dropped and in int8, an eighth of the bytes."""
    base = save(tiny_llama(), tmp_path / "base")
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    exact = compress(base, tmp_path / "adapter", tmp_path / "exact")
    options: dict[str, Value] = {"drop": drop, "codec": "int8" if drop else "float32"}
    receipt = compress(base, tmp_path / "adapter", tmp_path / "out", method="lora-darex", options=options)
    artifact, original = open_artifact(tmp_path / "out"), open_artifact(tmp_path / "exact")
    assert {spec.kind for name in artifact.names for spec in artifact.specs(name)} == {"factors"}
    for name in artifact.names:
        (part,), (whole,) = artifact.delta(name).parts, original.delta(name).parts
        assert isinstance(part, LowRank)
        assert isinstance(whole, LowRank)
        for pruned, full in ((decode(part.a), decode(whole.a)), (decode(part.b), decode(whole.b))):
            assert (pruned == 0).sum() == drop * pruned.numel()
            if not drop:
                torch.testing.assert_close(pruned, full)
    if drop:
        assert artifact.totals()["factors"] < 0.13 * original.totals()["low_rank"]
    assert (exact.q, receipt.q is None) == (None, False)
    assert {row.kind for row in inspect(tmp_path / "out").rows} == {"factors"}


def test_what_is_no_product_is_stored_whole(tmp_path: Path) -> None:
    base = save(tiny_llama(), tmp_path / "base")
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    model.save_pretrained(tmp_path / "adapter")
    compress(base, tmp_path / "adapter", tmp_path / "out", method="lora-darex")
    artifact = open_artifact(tmp_path / "out")
    kinds = {name: [spec.kind for spec in artifact.specs(name)] for name in artifact.names}
    assert kinds["model.norm.weight"] == ["dense"]
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == ["factors"]
