"""What only the compiled backend can get wrong: tiles, threads, wide inputs, pointers, malformed tables, its OpenMP."""

import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from dense_oracle import BLOCKS, CODECS, assert_close, random_delta, random_sparse

from deltaserve.kernels import dispatch, reference
from deltaserve.kernels.codes import float_codes
from deltaserve.kernels.cpu import layout, library
from deltaserve.kernels.cpu.operations import CpuBackend
from deltaserve.kernels.parts import Codes, Delta, Sparse
from deltaserve.kernels.segments import BASE, Segments

CPU = [CpuBackend(name) for name in library.instruction_sets()]
each = pytest.mark.parametrize("backend", CPU, ids=[backend.NAME for backend in CPU])


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(3)


def test_auto_is_compiled_and_the_fastest_for_this_machine():
    assert f"cpu-{library.instruction_sets()[0]}" == dispatch.backend().NAME
    assert dispatch.backend("reference") is reference
    assert library.instruction_sets()[-1] == "portable"


def test_an_instruction_set_that_is_missing_is_an_error():
    with pytest.raises(RuntimeError, match=r"'sve2'; it can: .*portable"):
        CpuBackend("sve2")


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux' list of loaded libraries")
def test_the_process_has_one_openmp_runtime_and_it_is_torchs():
    code = """
from deltaserve.kernels import dispatch
import torch, deltaserve.kernels.cpu.library as library
library.library()
torch.mm(torch.ones(300, 300), torch.ones(300, 300))
print(*{line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]}, sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = [path for path in done.stdout.split() if re.search(r"lib[gi]?omp", path)]
    assert len(loaded) == 1, loaded
    assert "torch" in loaded[0]


@each
@pytest.mark.parametrize("block", BLOCKS)
def test_any_number_of_rows_scattered_over_the_batch(backend, block, rng):
    pairs = [random_delta(rng, ["sparse", "low_rank", "rows"], 133, 63, block, codec) for codec in ("int2", "int8")]
    bank = [backend.prepare(delta) for delta, _ in pairs]
    for rows in (1, 3, 4, 7, 8, 9, 16, 17, 40, 100):
        owners = torch.tensor([0, 1, BASE] * rows)
        x, y = torch.randn(len(owners), 63, generator=rng), torch.zeros(len(owners), 133)
        backend.delta_linear_(y, x, bank, Segments.of([1] * len(owners), owners.tolist()))
        for slot, (_, dense) in enumerate(pairs):
            mine = owners == slot
            assert_close(y[mine], x[mine].double() @ dense.T, torch.float32, f"slot {slot}, {rows} rows")
        assert not y[owners == BASE].any()


@each
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("block", [4, 64])
def test_threads_share_the_work_of_a_large_layer(backend, codec, block, rng):
    prepared, dense = [], []
    for _ in range(3):
        columns = torch.stack([torch.randperm(2000, generator=rng)[:40].sort().values for _ in range(1536 // block)])
        codes = Codes(
            codec,
            (1536 // block, 40, block),
            torch.randint(0, 100, (1536 * 40 * 4,), dtype=torch.uint8, generator=rng),
            torch.full((1536 * 40 // 64,), 0.5, dtype=torch.bfloat16),
            64,
        )
        if codec in ("float32", "bf16"):
            codes = float_codes(torch.randn(1536 * 40, generator=rng), codec, codes.shape)
        delta = Delta((1536, 2000), (Sparse((1536, 2000), columns.int(), codes, torch.rand(2000, generator=rng)),))
        prepared.append(backend.prepare(delta))
        dense.append(reference.unpack(delta).double())
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for lengths in ([1, 1, 1], [20, 2, 30]):
            x, y = torch.randn(sum(lengths), 2000, generator=rng), torch.zeros(sum(lengths), 1536)
            backend.delta_linear_(y, x, prepared, Segments.of(lengths, [0, 1, 2]))
            expected = [part.double() @ full.T for part, full in zip(x.split(lengths), dense, strict=True)]
            assert_close(y, torch.cat(expected), torch.float32, "y")
    finally:
        torch.set_num_threads(threads)


@each
def test_inputs_wider_than_a_16_bit_column(backend, rng):
    width = (1 << 16) + 100
    columns = torch.tensor([[5, width - 1], [0, width - 2]], dtype=torch.int32)
    values = float_codes(torch.tensor([1.0, 2.0, 3.0, 4.0]), "bf16", (2, 2, 1))
    delta = Delta((2, width), (Sparse((2, width), columns, values, torch.full((width,), 2.0)),))
    prepared = backend.prepare(delta)
    for rows in (1, 8):
        x, y = torch.randn(rows, width, generator=rng), torch.zeros(rows, 2)
        backend.delta_linear_(y, x, [prepared], Segments.of([rows], [0]))
        expected = torch.stack([2 * x[:, 5] + 4 * x[:, -1], 6 * x[:, 0] + 8 * x[:, -2]], 1)
        assert_close(y, expected.double(), torch.float32, "y")
    y, weight = torch.zeros(1, width), torch.zeros(2, width)
    backend.delta_embedding_(y, torch.tensor([1]), [prepared], Segments.of([1], [0]))
    backend.swap_in_(weight, delta)
    assert torch.equal(y[0], weight[1])
    assert weight[1].nonzero().flatten().tolist() == [0, width - 2]


@each
@pytest.mark.parametrize(
    ("offsets", "slots", "message"),
    [
        ([0, 3, 2, 4], [0, 0, 0], "ascend"),
        ([1, 4], [0], "begin at 0"),
        ([0, 5], [0], "end at the number of rows"),
        ([0, 3], [0], "end at the number of rows"),
        ([0, 4], [1], "slot"),
        ([0, 4], [-2], "slot"),
        ([0, 4], [2**31 - 1], "slot"),
    ],
)
def test_a_malformed_segment_table_is_refused_and_nothing_written(backend, offsets, slots, message, rng):
    delta, _ = random_delta(rng, ["sparse"], 16, 16, 4, "int8")
    bank = [backend.prepare(delta)]
    table = Segments(torch.tensor(offsets, dtype=torch.int32), torch.tensor(slots, dtype=torch.int32), {0: slice(0, 4)})
    y = torch.zeros(4, 16)
    with pytest.raises(ValueError, match=message):
        backend.delta_linear_(y, torch.ones(4, 16), bank, table)
    with pytest.raises(ValueError, match=message):
        backend.delta_embedding_(y, torch.zeros(4, dtype=torch.int64), bank, table)
    assert not y.any()


@each
def test_shapes_and_ids_that_do_not_fit_are_refused(backend, rng):
    delta, _ = random_delta(rng, ["sparse"], 16, 20, 4, "int8")
    bank, segments = [backend.prepare(delta)], Segments.of([2], [0])
    for y, x, message in (((2, 16), (2, 19), "x is not as wide"), ((2, 15), (2, 20), "y has not the width")):
        with pytest.raises(ValueError, match=message):
            backend.delta_linear_(torch.zeros(y), torch.ones(x), bank, segments)
    for ids in ([0, 16], [-1, 0]):
        with pytest.raises(ValueError, match="vocabulary"):
            backend.delta_embedding_(torch.zeros(2, 20), torch.tensor(ids), bank, segments)
    with pytest.raises(ValueError, match="1 ids for 2 rows"):
        backend.delta_embedding_(torch.zeros(2, 20), torch.tensor([0]), bank, segments)
    with pytest.raises(ValueError, match="contiguous weight"):
        backend.swap_in_(torch.zeros(20, 16), delta)


def test_columns_out_of_range_or_order_are_refused(rng):
    part, _ = random_sparse(rng, 16, 20, 16, "int8")
    kept = part.columns.shape[1]
    for columns in (part.columns + 20, -1 - part.columns, part.columns.flip(1) if kept > 1 else part.columns - 20):
        bad = Sparse(part.shape, columns.int(), part.values, part.factors)
        with pytest.raises(ValueError, match=r"Columns"):
            layout.prepare(Delta((16, 20), (bad,)))


def test_slots_follow_what_is_put_into_them(rng):
    backend = CPU[0]
    (first, one), (second, two) = (random_delta(rng, ["sparse"], 16, 16, 4, "int8") for _ in range(2))
    slots = backend.slots([None, backend.prepare(first)])
    segments, x = Segments.of([1, 1], [0, 1]), torch.randn(2, 16, generator=rng)
    slots[0] = backend.prepare(second)
    y = torch.zeros(2, 16)
    backend.delta_linear_(y, x, slots, segments)
    assert_close(y, torch.stack([two @ x[0].double(), one @ x[1].double()]), torch.float32, "y")
    slots[0] = slots[1] = None
    before = y.clone()
    backend.delta_linear_(y, x, slots, segments)
    assert torch.equal(y, before)


def test_calls_from_several_threads_at_once(rng):
    backend = CPU[0]
    delta, dense = random_delta(rng, ["sparse", "low_rank"], 133, 133, 16, "int4")
    bank, segments, x = [backend.prepare(delta)], Segments.of([20], [0]), torch.randn(20, 133, generator=rng)
    results: list[torch.Tensor] = []

    def run() -> None:
        for _ in range(20):
            y = torch.zeros(20, 133)
            backend.delta_linear_(y, x, bank, segments)
            results.append(y)

    workers = [threading.Thread(target=run) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 80
    for y in results:
        assert_close(y, x.double() @ dense.T, torch.float32, "y")
