"""What the Triton kernels read on the device: replays of one captured launch, and tables that lie."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from dense_oracle import assert_close, random_delta, random_sparse

from deltaserve.kernels import dispatch
from deltaserve.kernels.parts import Codes, Delta, LowRank, Rows, Sparse
from deltaserve.kernels.segments import BASE, Segments

pytest.importorskip("triton")
from triton.runtime.interpreter import InterpretedFunction

TRITON = dispatch.backend("triton")


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(3)


def captured(run):
    """The launches of ``run``, to be made again with the very same arguments: on a GPU as a CUDA graph."""
    run()  # compiles, on a GPU
    if not TRITON.interpreted:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay
    launches = []
    with pytest.MonkeyPatch.context() as patch:
        launch = InterpretedFunction.run
        patch.setattr(
            InterpretedFunction, "run", lambda *a, **keywords: launches.append(partial(launch, *a, **keywords))
        )
        run()
    return lambda: [launch() for launch in launches]


def test_captured_launches_serve_whatever_variants_and_segments_come_next(rng):
    deltas = [random_delta(rng, kinds, 20, 24, 4, codec) for kinds, codec in (
        (["sparse"], "int4"), (["low_rank", "rows"], "bf16"), (["dense"], "sign"))]  # fmt: skip
    prepared = [TRITON.prepare(delta) for delta, _ in deltas]
    slots, tiles = TRITON.slots([prepared[0], None, None]), TRITON.tiles(rows=20, slots=3)
    x, ids = torch.randn(20, 24, generator=rng).to(TRITON.device), torch.arange(20, device=TRITON.device)
    y, rows = torch.zeros(20, 20, device=TRITON.device), torch.zeros(20, 24, device=TRITON.device)
    replay_linear = captured(lambda: TRITON.delta_linear_(y, x, slots, tiles))
    replay_embedding = captured(lambda: TRITON.delta_embedding_(rows, ids, slots, tiles))

    def replayed(lengths, owners, variants):
        tiles.assign(Segments.of(lengths, owners))
        y.zero_(), rows.zero_()
        replay_linear(), replay_embedding()
        row_owner = [slot for length, slot in zip(lengths, owners, strict=True) for _ in range(length)]
        for row, slot in enumerate(row_owner + [BASE] * (20 - len(row_owner))):
            dense = deltas[variants[slot]][1] if slot in variants else torch.zeros(20, 24, dtype=torch.float64)
            assert_close(y[row].cpu(), dense @ x[row].cpu().double(), torch.float32, f"y {row}")
            assert_close(rows[row].cpu(), dense[row], torch.float32, f"row {row}")

    replayed([2, 17], [BASE, 0], {0: 0})
    slots[0], slots[2] = prepared[1], prepared[2]
    replayed([4, 1, 1, 3], [2, BASE, 0, 1], {0: 1, 2: 2})
    slots[2] = None
    replayed([1, 1], [2, 0], {0: 1})
    replayed([], [], {})


@pytest.mark.parametrize("tile", [(0, 4, 9), (0, 4, -7), (-4, 4, 0), (4, 4, 0), (2**31 - 2, 4, 0), (0, -3, 0)])
def test_a_table_that_lies_writes_nowhere(tile, rng):
    delta, _ = random_delta(rng, ["sparse", "low_rank"], 16, 16, 4, "int8")
    slots, tiles = TRITON.slots([TRITON.prepare(delta)]), TRITON.tiles(rows=4, slots=1)
    tiles.table[0] = torch.tensor(tile, dtype=torch.int32)
    around = torch.zeros(12, 20, device=TRITON.device)
    y = around[4:8, 2:18]
    TRITON.delta_linear_(y, torch.ones_like(y), slots, tiles)
    TRITON.delta_embedding_(y, torch.zeros(4, dtype=torch.int64, device=TRITON.device), slots, tiles)
    assert not around.any()


def test_ids_out_of_range_add_nothing_where_the_host_cannot_see_them(rng):
    delta, dense = random_delta(rng, ["sparse", "rows"], 16, 16, 4, "int8")
    slots, tiles = TRITON.slots([TRITON.prepare(delta)]), TRITON.tiles(rows=4, slots=1)
    tiles.assign(Segments.of([4], [0]))
    y = torch.zeros(4, 16, device=TRITON.device)
    TRITON.delta_embedding_(y, torch.tensor([-1, 16, 3, 2**40], device=TRITON.device), slots, tiles)
    assert not y[[0, 1, 3]].any()
    assert_close(y[2].cpu(), dense[3], torch.float32, "row")


def test_a_fixed_table_has_a_size_and_slots(rng):
    tiles = TRITON.tiles(rows=4, slots=2)
    with pytest.raises(ValueError, match="number of rows of y and x, 4"):
        tiles.assign(Segments.of([5], [0]))
    with pytest.raises(ValueError, match="slot 2"):
        tiles.assign(Segments.of([1], [2]))
    with pytest.raises(ValueError, match="of rank 3; these slots were made for at most 2"):
        TRITON.slots([TRITON.prepare(random_delta(rng, ["low_rank"], 16, 16, 4, "int8")[0])], rank=2)


def test_a_table_for_few_runs_is_shorter_than_its_rows_and_says_where_each_row_looks_up():
    tiles = TRITON.tiles(rows=40, slots=2, runs=2)
    assert len(tiles.table) == 40 // 16 + 2 * 4
    tiles.assign(Segments.of([13, 13], [0, 1]))
    assert tiles.table[:8, 1].tolist() == [4, 4, 4, 1, 4, 4, 4, 1]
    with pytest.raises(ValueError, match="3 runs; this one was made for 2"):
        tiles.assign(Segments.of([13, 13, 13], [0, 1, 0]))
    assert tiles.places.tolist() == [1] * 13 + [2] * 13 + [0] * 14
    assert tiles.rows == {0: slice(0, 13), 1: slice(13, 26)}
    tiles.assign(Segments.of([2, 1], [BASE, 1]))
    assert tiles.places.tolist() == [0, 0, 2] + [0] * 37


@pytest.mark.parametrize(
    ("offsets", "slots", "message"),
    [
        ([0, 3, 2, 4], [0, 0, 0], "ascend"),
        ([1, 4], [0], "begin at 0"),
        ([0, 5], [0], "end at the number of rows"),
        ([0, 3], [0], "end at the number of rows"),
        ([0, 4], [1], "slot 1"),
        ([0, 4], [-2], "slot -2"),
        ([0, 4], [2**31 - 1], "slot"),
    ],
)
def test_a_malformed_segment_table_is_refused_and_nothing_written(offsets, slots, message, rng):
    bank = [TRITON.prepare(random_delta(rng, ["sparse"], 16, 16, 4, "int8")[0])]
    table = Segments(torch.tensor(offsets, dtype=torch.int32), torch.tensor(slots, dtype=torch.int32), {0: slice(0, 4)})
    y = torch.zeros(4, 16, device=TRITON.device)
    with pytest.raises(ValueError, match=message):
        TRITON.delta_linear_(y, torch.ones_like(y), bank, table)
    with pytest.raises(ValueError, match=message):
        TRITON.delta_embedding_(y, torch.zeros(4, dtype=torch.int64, device=TRITON.device), bank, table)
    assert not y.any()


def test_shapes_and_ids_that_do_not_fit_are_refused(rng):
    delta, _ = random_delta(rng, ["sparse"], 16, 20, 4, "int8")
    bank, segments = [TRITON.prepare(delta)], Segments.of([2], [0])
    y = torch.zeros(2, 20, device=TRITON.device)
    with pytest.raises(ValueError, match="x is not as wide"):
        TRITON.delta_linear_(y, y[:, 1:], bank, segments)
    with pytest.raises(ValueError, match="y has not the width"):
        TRITON.delta_linear_(y[:, :15], y, bank, segments)
    with pytest.raises(ValueError, match="1 x for 2 rows"):
        TRITON.delta_linear_(y, y[:1], bank, segments)
    with pytest.raises(ValueError, match="The triton kernels run on"):
        TRITON.delta_linear_(torch.zeros(2, 16, device="meta"), y, bank, segments)
    if TRITON.interpreted:  # on a GPU the host does not look at ids
        for ids in ([0, 16], [-1, 0]):
            with pytest.raises(ValueError, match="vocabulary of 16"):
                TRITON.delta_embedding_(y, torch.tensor(ids), bank, segments)
    assert not y.any()


def test_parts_that_would_lead_a_kernel_astray_are_refused(rng):
    part, _ = random_sparse(rng, 16, 20, 16, "int8")
    short = Codes("int8", part.values.shape, part.values.data[:-1], part.values.scales, part.values.group)
    of_24 = Codes("int8", (1, 1, 24), part.values.data, part.values.scales, part.values.group)
    one_column = part.columns[:, :1]
    for bad, message in (
        (Sparse(part.shape, part.columns + 20, part.values, part.factors), "Columns"),
        (Sparse(part.shape, part.columns - 20, part.values, part.factors), "Columns"),
        (Sparse(part.shape, part.columns.flip(1), part.values, part.factors), "ascend"),
        (Sparse(part.shape, part.columns, short, part.factors), "do not fit"),
        (Sparse(part.shape, one_column, of_24, part.factors), "Blocks of 24"),
        (Sparse(part.shape, part.columns, part.values, part.factors[1:]), "factors"),
        (LowRank((16, 20), short, short), "do not fit"),
        (Rows((16, 20), torch.tensor([3, 2]), short, None, 16), "Row ids"),
    ):
        with pytest.raises(ValueError, match=message):
            TRITON.prepare(Delta((16, 20), (bad,)))
    with pytest.raises(ValueError, match="9 parts"):
        TRITON.prepare(Delta((16, 20), (part,) * 9))


def test_auto_stays_on_the_cpu_and_triton_without_a_gpu_or_its_package_is_an_error():
    assert dispatch.backend() is not TRITON
    assert dispatch.backend("triton") is TRITON
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    for before, message in (
        ("", "need a GPU, and torch sees none"),
        ("import sys; sys.modules['triton'] = None; ", "pip install 'deltaserve[gpu]'"),
    ):
        code = before + "from deltaserve.kernels import dispatch; dispatch.backend('triton')"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert message in done.stderr.splitlines()[-1]
