"""A variant's memory: its deltas lie together, share columns with those of its seed, and leave nothing behind."""

import gc
import weakref

import pytest
import torch
from dense_oracle import assert_close, random_delta

from deltaserve.kernels.codes import BITS, pack_bits
from deltaserve.kernels.cpu import library, memory
from deltaserve.kernels.cpu.layout import Prepared
from deltaserve.kernels.cpu.operations import CpuBackend
from deltaserve.kernels.parts import Codes, Delta, LowRank
from deltaserve.kernels.reference import unpack
from deltaserve.kernels.segments import Segments

CPU = [CpuBackend(name) for name in library.instruction_sets()]
KINDS = ["sparse", "low_rank", "dense", "rows"]


def variant(seed: int, layers: int = 9) -> list[Delta]:
    rng = torch.Generator().manual_seed(seed)
    return [random_delta(rng, KINDS, 70 + i, 50 + i, 4, "int4")[0] for i in range(layers)]


def prepared(deltas: list[Delta]) -> list[Prepared]:
    with CPU[0].one_variant() as lay_out:
        return [lay_out(delta) for delta in deltas]


def product(one: Prepared) -> torch.Tensor:
    out, width = one.shape
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    y = torch.zeros(5, out)
    CPU[0].delta_linear_(y, x, [one], Segments.of([5], [0]))
    return y


def test_deltas_that_lie_together_are_what_each_is_alone() -> None:
    deltas = variant(0)
    for together, delta in zip(prepared(deltas), deltas, strict=True):
        alone = CPU[0].prepare(delta)
        assert torch.equal(product(together), product(alone))
        assert together.nbytes == alone.nbytes


def test_the_columns_of_one_seed_are_there_once_and_go_with_the_last_that_has_them() -> None:
    gc.collect()
    before = len(memory._COLUMNS)
    first, same, other = prepared(variant(0)), prepared(variant(0)), prepared(variant(1))
    assert len(memory._COLUMNS) == before + 2
    expected = [product(one) for one in same]
    pages = [weakref.ref(page) for page in other[0]._memory._pages]
    del first, other
    gc.collect()
    assert len(memory._COLUMNS) == before + 1
    assert not any(page() for page in pages)
    assert all(torch.equal(product(one), y) for one, y in zip(same, expected, strict=True))
    del same
    gc.collect()
    assert len(memory._COLUMNS) == before


def test_a_delta_larger_than_a_chunk_has_pages_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    one = memory.Memory(chunk=1 << 12)
    small, large, after = one.take(100), one.take(1 << 14), one.take(24)
    assert after == small + 104
    assert not small <= large < small + (1 << 12)
    assert one.nbytes == 104 + (1 << 14) + 24


@pytest.mark.parametrize("backend", CPU, ids=[backend.NAME for backend in CPU])
@pytest.mark.parametrize("codec", ["int8", "int4", "int2", "sign"])
@pytest.mark.parametrize(("rank", "rows_a_scale"), [(4, 16), (1, 32), (3, 48), (8, 8), (2, 1), (2, 24)])
def test_a_second_factor_may_have_a_scale_for_many_rows(
    backend: CpuBackend, codec: str, rank: int, rows_a_scale: int
) -> None:
    out, width = 133, 40
    rng = torch.Generator().manual_seed(rank)

    def codes(shape: tuple[int, int], group: int) -> Codes:
        levels = torch.randint(0, 2 ** min(BITS[codec], 7), shape, generator=rng)
        scales = torch.rand(-(-levels.numel() // group), generator=rng).bfloat16()
        return Codes(codec, shape, pack_bits(levels, codec), scales, group)

    delta = Delta(
        (out, width), (LowRank((out, width), codes((rank, width), 16), codes((out, rank), rank * rows_a_scale)),)
    )
    one, dense = backend.prepare(delta), unpack(delta).double()
    for rows in (1, 3, 9, 17):
        x, y = torch.randn(rows, width, generator=rng), torch.zeros(rows, out)
        backend.delta_linear_(y, x, [one], Segments.of([rows], [0]))
        assert_close(y, x.double() @ dense.T, torch.float32, "y")
    y, ids = torch.zeros(4, width), torch.tensor([0, 17, 131, 132])
    backend.delta_embedding_(y, ids, [one], Segments.of([4], [0]))
    assert_close(y, dense[ids], torch.float32, "y")
