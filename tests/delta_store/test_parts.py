"""Parts through their bytes and back, over shapes, blocks and codecs; and bytes that do not fit their specification."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from deltaserve.delta_store.codec import encode, parts
from deltaserve.delta_store.codec.columns import seeded_columns
from deltaserve.delta_store.codec.planes import expand_ascending, squeeze_ascending
from deltaserve.delta_store.codec.specs import DenseSpec, LowRankSpec, RowsSpec, SparseSpec, Spec, XorSpec
from deltaserve.delta_store.codec.xor import restore, xor
from deltaserve.delta_store.errors import (
    ArtifactError,
    BaseMismatch,
    CorruptArtifact,
    ProfileMissing,
    UnsupportedCheckpoint,
)
from deltaserve.kernels.codes import FLOAT_CODECS
from deltaserve.kernels.parts import Delta, Part
from deltaserve.kernels.reference import unpack

CODECS = st.sampled_from(["float32", "bf16", "int8", "int4", "int2", "sign"])
SIDES = st.sampled_from([1, 2, 63, 133])
BLOCKS = st.sampled_from([1, 4, 8, 16, 32, 64])


@dataclass
class Weights:
    """A profile in which column ``j`` of every parameter has weight ``16 + j``."""

    width: int
    digest: str = "d" * 64

    def __contains__(self, name: str) -> bool:
        return name == "w"

    def weights(self, name: str) -> Tensor:
        return torch.arange(16, 16 + self.width)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def group_for(codec: str, group: int) -> int:
    return 1 if codec in FLOAT_CODECS else group


def dense_of(part: Part) -> Tensor:
    return unpack(Delta(part.shape, (part,)))


def through_bytes(part: Any, spec: Spec, profile: Weights | None = None, base: Tensor | None = None) -> Part:
    data = parts.encode(part, spec)
    offset = torch.frombuffer(bytearray(b"\0" + data), dtype=torch.uint8)[1:]
    return parts.decode(offset, spec, "w", profile, base)


def sparse_spec(out: int, width: int, **changes: Any) -> SparseSpec:
    fields: dict[str, Any] = {
        "shape": (out, width),
        "mask": "uniform",
        "kept": max(1, width // 10),
        "block": 4,
        "codec": "int4",
        "group": 64,
        "seed": 3,
        "divisor": 0.1,
    }
    return SparseSpec(**fields | changes)


@settings(max_examples=120, deadline=None)
@given(
    out=SIDES,
    width=SIDES,
    block=BLOCKS,
    codec=CODECS,
    mask=st.sampled_from(["uniform", "weighted", "explicit"]),
    data=st.data(),
)
def test_sparse_parts_come_back(out: int, width: int, block: int, codec: str, mask: str, data: st.DataObject) -> None:
    spec = sparse_spec(
        out,
        width,
        mask=mask,
        kept=data.draw(st.integers(1, width)),
        block=block,
        codec=codec,
        group=group_for(codec, data.draw(st.sampled_from([64, 128]))),
        seed=None if mask == "explicit" else data.draw(st.integers(0, 2**63 - 1)),
    )
    profile = Weights(width)
    delta = drawn(out, width)
    if mask == "explicit":
        columns = torch.stack([torch.randperm(width)[: spec.kept].sort().values for _ in range(spec.blocks)])
        part = encode.explicit_sparse(delta, spec, columns)
    else:
        part = encode.seeded_sparse(delta, spec, "w", profile)
    back = through_bytes(part, spec, profile)
    assert dense_of(back).equal(dense_of(part))
    assert dense_of(back).count_nonzero() == out * spec.kept or codec in ("int8", "int4")


@settings(max_examples=40, deadline=None)
@given(out=SIDES, width=SIDES, codec=CODECS, data=st.data())
def test_low_rank_parts_come_back(out: int, width: int, codec: str, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(out, width)))
    spec = LowRankSpec(shape=(out, width), rank=rank, codec=codec, group=group_for(codec, rank * 16))
    part = encode.low_rank(drawn(rank, width), drawn(out, rank), spec)
    assert dense_of(through_bytes(part, spec)).equal(dense_of(part))


@settings(max_examples=40, deadline=None)
@given(shape=st.one_of(st.tuples(SIDES), st.tuples(SIDES, SIDES)), codec=CODECS, group=st.sampled_from([1, 64, 500]))
def test_dense_parts_come_back(shape: tuple[int, ...], codec: str, group: int) -> None:
    spec = DenseSpec(shape=shape, codec=codec, group=group_for(codec, group))
    part = encode.dense(drawn(*shape), spec)
    assert dense_of(through_bytes(part, spec)).equal(dense_of(part))


@settings(max_examples=40, deadline=None)
@given(out=SIDES, width=SIDES, codec=CODECS, has_mean=st.booleans(), data=st.data())
def test_rows_parts_come_back(out: int, width: int, codec: str, has_mean: bool, data: st.DataObject) -> None:
    ids = torch.tensor(sorted(data.draw(st.sets(st.integers(0, out - 1)))), dtype=torch.int64)
    base_rows = data.draw(st.integers(1, out))
    spec = RowsSpec(shape=(out, width), base_rows=base_rows, count=len(ids), codec=codec, has_mean=has_mean)
    part = encode.rows(drawn(len(ids), width), ids, drawn(width, seed=1) if has_mean else None, spec)
    assert dense_of(through_bytes(part, spec)).equal(dense_of(part))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.one_of(st.tuples(SIDES), st.tuples(SIDES, SIDES)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    base_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    added=st.integers(0, 1),
)
def test_lossless_parts_give_back_every_bit(
    shape: tuple[int, ...], dtype: torch.dtype, base_dtype: torch.dtype, added: int
) -> None:
    base = drawn(*shape).to(base_dtype)
    fine = drawn(shape[0] + added, *shape[1:], seed=1).to(dtype)
    fine.view(-1)[0] = -0.0
    spec, payload = xor(base, fine)
    back = restore(payload.data, spec, base)
    words = torch.int32 if dtype == torch.float32 else torch.int16
    assert back.dtype == dtype
    assert back.view(words).equal(fine.view(words))
    expected = fine.float()
    expected[: len(base)] -= base.float()
    assert dense_of(through_bytes(payload, spec, base=base)).equal(expected)


def test_dare_keeps_the_delta_on_average() -> None:
    """With q = kept / width a survivor is divided by its own probability, though strata differ in size (64 by 7)."""
    delta = drawn(4, 64).abs() + 1
    mean = torch.zeros(4, 64)
    for seed in range(2000):
        spec = sparse_spec(4, 64, kept=7, codec="float32", group=1, seed=seed, divisor=7 / 64)
        mean += dense_of(encode.seeded_sparse(delta, spec, "w")) / 2000
    deviation = ((mean - delta) / delta).abs()
    assert deviation.max() < 6 * (64 / 7 / 2000) ** 0.5
    assert ((mean - delta) / delta).mean().abs() < 0.02


@pytest.mark.parametrize(("mask", "divisor"), [("uniform", 0.25), ("weighted", 1.0), ("explicit", 0.5)])
def test_factors_follow_from_mask_and_divisor(mask: str, divisor: float) -> None:
    spec = sparse_spec(4, 8, mask=mask, kept=2, divisor=divisor, seed=None if mask == "explicit" else 1)
    if mask == "explicit":
        part = encode.explicit_sparse(torch.ones(4, 8), spec, torch.tensor([[1, 5]]))
        assert part.factors.tolist() == [2.0] * 8
    elif mask == "uniform":
        assert seeded_columns(spec, "w", None)[1].tolist() == [4.0] * 8
    else:
        factors = seeded_columns(spec, "w", Weights(8))[1]
        total = sum(range(16, 24))
        assert factors.tolist() == pytest.approx([total / (2 * (16 + j)) for j in range(8)])


def test_columns_and_factors_as_literal_values() -> None:
    """Checked against a plain scalar implementation."""
    weighted = sparse_spec(8, 6, mask="weighted", kept=2, divisor=1.0)
    columns, factors = seeded_columns(weighted, "w", Weights(6))
    assert columns.tolist() == [[0, 3], [2, 4]]
    assert factors.tolist() == torch.tensor([111 / (2 * weight) for weight in range(16, 22)]).tolist()
    uniform = sparse_spec(8, 6, kept=4, divisor=0.5)
    columns, factors = seeded_columns(uniform, "w", None)
    assert columns.tolist() == [[0, 2, 3, 4], [0, 1, 3, 5]]
    assert factors.tolist() == torch.tensor([size * 4 / 6 / 0.5 for size in (1, 2, 2, 1, 2, 2)]).tolist()


def test_a_weighted_mask_needs_a_profile_that_fits() -> None:
    spec = sparse_spec(4, 8, mask="weighted", kept=2)
    with pytest.raises(ProfileMissing):
        seeded_columns(spec, "w", None)
    with pytest.raises(BaseMismatch, match="no weights for other"):
        seeded_columns(spec, "other", Weights(8))
    with pytest.raises(BaseMismatch, match="9 weights for w, the delta 8 columns"):
        seeded_columns(spec, "w", Weights(9))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_part_of_the_wrong_length_is_refused(change: int) -> None:
    spec = sparse_spec(133, 63)
    data = parts.encode(encode.seeded_sparse(drawn(133, 63), spec, "w"), spec)
    parts.check_length(spec, len(data))
    with pytest.raises(CorruptArtifact, match=f"has {len(data) + change} bytes.*asks for {len(data)}"):
        parts.check_length(spec, len(data) + change)


def test_a_part_that_disagrees_with_its_specification_is_not_written() -> None:
    part = encode.seeded_sparse(drawn(8, 8), sparse_spec(8, 8), "w")
    for other in (sparse_spec(8, 8, codec="int2"), sparse_spec(8, 9, kept=2), sparse_spec(8, 8, group=128)):
        with pytest.raises(ArtifactError, match="do not fit"):
            parts.encode(part, other)
    with pytest.raises(ArtifactError, match="does not agree"):
        parts.encode(part, DenseSpec(shape=(8, 8), codec="int4", group=8))


def test_an_index_out_of_range_is_refused() -> None:
    packed = squeeze_ascending(torch.tensor([[0, 3, 9]]).numpy())
    assert expand_ascending(packed, 1, 3, 10).tolist() == [[0, 3, 9]]
    with pytest.raises(CorruptArtifact, match="index 9 is out of range"):
        expand_ascending(packed, 1, 3, 9)
    with pytest.raises(CorruptArtifact, match="announces"):
        expand_ascending(packed, 1, 4, 10)
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        expand_ascending(packed[:-1], 1, 3, 10)


def test_a_number_that_is_not_finite_is_refused() -> None:
    spec = DenseSpec(shape=(3,), codec="int8", group=3)
    data = parts.encode(encode.dense(drawn(3), spec), spec)
    hostile = torch.tensor([0x80, 0x7F, *data[2:]], dtype=torch.uint8)
    with pytest.raises(CorruptArtifact, match="not finite"):
        parts.decode(hostile, spec, "w", None, None)


def test_a_lossless_part_beside_another_base_is_refused() -> None:
    base, fine = drawn(4, 5), drawn(4, 5, seed=1)
    spec, payload = xor(base, fine)
    with pytest.raises(BaseMismatch, match="values are not those"):
        restore(payload.data, spec, base + 1)
    with pytest.raises(BaseMismatch, match=r"\[4, 5\].*\[4, 6\]"):
        restore(payload.data, spec, drawn(4, 6))
    with pytest.raises(BaseMismatch, match=r"\[1048576, 5\]"):
        restore(payload.data, XorSpec(shape=(1 << 20, 5), dtype="float32"), base)
    with pytest.raises(BaseMismatch, match="beside the base"):
        through_bytes(payload, spec)
    with pytest.raises(UnsupportedCheckpoint, match="int64"):
        xor(base, torch.ones(4, 5, dtype=torch.int64))


@pytest.mark.parametrize(
    "changes",
    [
        {"kept": 64},
        {"kept": 0},
        {"kept": 1.0},
        {"block": 5},
        {"codec": "int3"},
        {"group": 6},
        {"group": 0},
        {"codec": "bf16"},
        {"shape": (0, 63)},
        {"shape": (-133, 63)},
        {"shape": ((1 << 20) + 1, 63)},
        {"shape": (133, 63, 1)},
        {"seed": None},
        {"seed": -1},
        {"seed": 1 << 63},
        {"mask": "explicit"},
        {"divisor": 0.0},
        {"divisor": float("nan")},
        {"divisor": 1e7},
        {"unknown": 1},
    ],
)
def test_a_specification_out_of_range_is_refused(changes: dict[str, Any]) -> None:
    sparse_spec(133, 63)
    with pytest.raises(ValidationError):
        sparse_spec(133, 63, **changes)
