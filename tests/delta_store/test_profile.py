"""The activation profile: exact bytes, shared vectors, kept once a base, refused where it does not belong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save, tiny_gpt2, tiny_llama

from deltaserve.delta_store.calibration import is_linear, measure_inputs, profile_for
from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.errors import BaseMismatch, CorruptArtifact, OptionError, ProfileMissing
from deltaserve.delta_store.fingerprint import fingerprint
from deltaserve.delta_store.profile import LARGEST_WEIGHT, Profile, encode, file_name, find_profile, write_profile
from deltaserve.delta_store.text import Sample

LAYER = "model.layers.0."


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(), tmp_path_factory.mktemp("base"), vocab=64)


def test_every_byte_is_the_nearest_weight_to_itself() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    weights = Profile("", "", {"v": codes}, {"p": "v"}).weights("p")
    assert weights.dtype == torch.int64
    assert (weights[0], weights[255]) == (16, LARGEST_WEIGHT)
    assert (weights.diff() > 0).all()
    assert torch.equal(encode(weights.float()), codes)


def test_encoding_is_within_half_a_step() -> None:
    rms = torch.logspace(-4, 0, 1000, dtype=torch.float64)
    weights = Profile("", "", {"v": encode(7 * rms)}, {"p": "v"}).weights("p") / LARGEST_WEIGHT
    assert ((weights / rms - 1).abs() < 0.0313).all()


def test_zeros_still_get_the_smallest_weight() -> None:
    assert encode(torch.zeros(3)).tolist() == [0, 0, 0]
    assert encode(torch.tensor([0.0, 1.0])).tolist() == [0, 255]


def of(model: Any) -> Callable[..., list[Any]]:
    """What runs a model that is there."""

    @torch.no_grad()
    def run(samples: Any, look: Any, progress: Any = None, inside: Any = None) -> list[Any]:
        with inside(model):
            return [look(model, sample) for sample in samples]

    return run


def test_rms_is_that_of_the_inputs() -> None:
    """Against hooks that add up by hand."""
    model = tiny_llama()
    samples = [Sample((1, 5, 9, 23)), Sample((40, 2, 17))]
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if is_linear(module):
            module.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0][0]))
    rms, vector_of = measure_inputs(of(model), samples)
    # The first forward pass of measure_inputs only looks at which inputs are shared.
    for parameter, vector in vector_of.items():
        inputs = torch.cat(seen[parameter.removesuffix(".weight")][1:])
        torch.testing.assert_close(rms[vector].float(), inputs.square().mean(0).sqrt())


def test_layers_that_read_one_input_share_a_vector() -> None:
    rms, vector_of = measure_inputs(of(tiny_llama()), [Sample((1, 2, 3))])
    attention = {vector_of[f"{LAYER}self_attn.{x}_proj.weight"] for x in "qkv"}
    mlp = {vector_of[f"{LAYER}mlp.{x}_proj.weight"] for x in ("gate", "up")}
    assert len(attention) == len(mlp) == 1
    assert len(rms) == 4 * 2
    assert "lm_head.weight" not in vector_of


def test_transposed_linears_are_in_it() -> None:
    rms, vector_of = measure_inputs(of(tiny_gpt2()), [Sample((1, 2, 3))])
    assert len(rms[vector_of["transformer.h.0.mlp.c_proj.weight"]]) == 128


def test_by_layers_it_is_the_same_file(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, digests = open_checkpoint(base), set()
    for memory in ("whole", "layers"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / memory))
        digests.add(profile_for(checkpoint, fingerprint(checkpoint), None, None, memory=memory).digest)
        assert (tmp_path / memory).is_dir()
    assert len(digests) == 1


def test_the_file_is_named_by_its_digest_and_repeats(tmp_path: Path) -> None:
    rms, vector_of = {"v": torch.rand(40)}, {"b": "v", "a": "v"}
    one = write_profile(tmp_path, "ab", rms, vector_of, "text")
    before = (tmp_path / file_name(one.digest)).read_bytes()
    other = write_profile(tmp_path, "ab", rms, dict(reversed(vector_of.items())), "text")
    assert one.digest == other.digest
    assert (tmp_path / file_name(one.digest)).read_bytes() == before
    again = find_profile(one.digest, tmp_path / "nowhere", tmp_path)
    assert torch.equal(again.weights("a"), one.weights("b"))
    assert ("a" in again, "c" in again) == (True, False)


def test_damage_is_noticed(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, "ab", {"v": torch.rand(40)}, {"a": "v"}, "text")
    path = tmp_path / file_name(profile.digest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptArtifact, match="digest"):
        find_profile(profile.digest, tmp_path)
    for damaged in (b"", b"short", bytes(data[:-5])):
        with pytest.raises(CorruptArtifact):
            Profile.from_bytes(damaged)


def test_a_missing_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileMissing, match=str(tmp_path)) as raised:
        find_profile("0" * 64, tmp_path)
    assert raised.value.digest == "0" * 64


def test_it_is_computed_once_for_each_text(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(base)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    built_in = profile_for(checkpoint, fingerprint(checkpoint), None, None)
    own = profile_for(checkpoint, fingerprint(checkpoint), text, None)
    assert built_in.digest != own.digest
    monkeypatch.setattr("deltaserve.delta_store.calibration.measure_inputs", None)
    assert profile_for(checkpoint, fingerprint(checkpoint), text, None).digest == own.digest
    assert profile_for(checkpoint, fingerprint(checkpoint), None, None).digest == built_in.digest


def test_a_profile_file_is_written_then_taken(base: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(base)
    file = tmp_path / "profile.safetensors"
    made = profile_for(checkpoint, fingerprint(checkpoint), None, file)
    assert Profile.open(file).digest == made.digest
    assert profile_for(checkpoint, fingerprint(checkpoint), None, file).digest == made.digest
    with pytest.raises(BaseMismatch, match="another base"):
        profile_for(checkpoint, "0" * 64, None, file)
    with pytest.raises(OptionError, match="one of the two"):
        profile_for(checkpoint, fingerprint(checkpoint), tmp_path / "text.txt", file)


def test_a_base_without_a_tokenizer_has_a_profile_too(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tiny_llama(), tmp_path / "bare"))
    assert f"{LAYER}mlp.up_proj.weight" in profile_for(checkpoint, "0" * 64, None, None)
    with pytest.raises(OptionError, match="no tokenizer"):
        profile_for(checkpoint, "0" * 64, tmp_path / "text.txt", None)
