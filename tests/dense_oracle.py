"""Random deltas, batches of named mixes, and the dense weights they mean, computed the slow and obvious way."""

import random
from math import prod

import torch
from deltaserve.kernels.codes import BITS, FLOAT_CODECS, float_codes, pack_bits
from deltaserve.kernels.parts import Codes, Delta, Dense, LowRank, Part, Rows, Sparse
from deltaserve.kernels.segments import BASE, Segments
from torch import Tensor

CODECS = tuple(BITS)
BLOCKS = (1, 4, 8, 16, 32, 64)
SIZES = (1, 3, 16, 63, 64, 133)
MIXES = ("identical", "distinct", "uniform", "zipf", "skewed")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest relative root-mean-square error by dtype of ``y``."""


def random_codes(rng: torch.Generator, codec: str, shape: tuple[int, ...], group: int) -> tuple[Codes, Tensor]:
    """Random codes and, value by value from the table in codes.py, the float64 numbers they stand for."""
    count = prod(shape)
    if codec in FLOAT_CODECS:
        values = torch.randn(count, generator=rng).to(FLOAT_CODECS[codec])
        return float_codes(values, codec, shape), values.double().reshape(shape)
    low, high = {"int8": (-127, 127), "int4": (1, 15), "int2": (0, 3), "sign": (0, 1)}[codec]
    # values near 1 for every codec: a product of two int8 factors would overflow float16
    scales = ((torch.rand(-(-count // group), generator=rng) + 0.5) / max(1, high // 2)).bfloat16()
    levels = torch.randint(low, high + 1, (count,), generator=rng)
    meaning = {
        "int8": lambda c: c,
        "int4": lambda c: c - 8,
        "int2": lambda c: c - 1.5,
        "sign": lambda c: 2 * c - 1,
    }[codec]
    numbers = [meaning(int(c)) * float(scales[i // group]) for i, c in enumerate(levels)]
    return Codes(codec, shape, pack_bits(levels, codec), scales, group), torch.tensor(numbers).double().reshape(shape)


def random_sparse(rng: torch.Generator, out: int, width: int, block: int, codec: str) -> tuple[Sparse, Tensor]:
    blocks = -(-out // block)
    kept = int(torch.randint(1, width + 1, (1,), generator=rng))
    columns = torch.stack([torch.randperm(width, generator=rng)[:kept].sort().values for _ in range(blocks)]).int()
    codes, numbers = random_codes(rng, codec, (blocks, kept, block), block * 3)
    factors = torch.rand(width, generator=rng) + 0.5
    dense = torch.zeros(out, width, dtype=torch.float64)
    for row in range(out):
        for k in range(kept):
            column = int(columns[row // block, k])
            dense[row, column] = numbers[row // block, k, row % block] * float(factors[column])
    return Sparse((out, width), columns, codes, factors), dense


def random_part(rng: torch.Generator, kind: str, out: int, width: int, block: int, codec: str) -> tuple[Part, Tensor]:
    """One part of a weight ``[out, width]`` and its dense float64 meaning."""
    if kind == "sparse":
        return random_sparse(rng, out, width, block, codec)
    if kind == "low_rank":
        a, dense_a = random_codes(rng, codec, (3, width), width)
        b, dense_b = random_codes(rng, codec, (out, 3), 3)
        return LowRank((out, width), a, b), dense_b @ dense_a
    if kind == "dense":
        codes, numbers = random_codes(rng, codec, (out, width), width)
        return Dense((out, width), codes), numbers
    count = int(torch.randint(0, out + 1, (1,), generator=rng))
    ids = torch.randperm(out, generator=rng)[:count].sort().values
    codes, numbers = random_codes(rng, codec, (count, width), width)
    mean = torch.randn(width, generator=rng) if count % 2 else None
    mean_rows = max(1, out - 2)
    dense = torch.zeros(out, width, dtype=torch.float64)
    if mean is not None:
        dense[:mean_rows] = mean.double()
    for i, row in enumerate(ids):
        dense[row] = numbers[i]
    return Rows((out, width), ids, codes, mean, mean_rows), dense


def random_delta(
    rng: torch.Generator, kinds: list[str], out: int, width: int, block: int, codec: str
) -> tuple[Delta, Tensor]:
    parts, dense = [], torch.zeros(out, width, dtype=torch.float64)
    for kind in kinds:
        part, meaning = random_part(rng, kind, out, width, block, codec)
        parts.append(part)
        dense += meaning
    return Delta((out, width), tuple(parts)), dense


def mix(name: str, runs: int, slots: int, seed: int) -> list[int]:
    """Which slot each run of rows belongs to; ``BASE`` takes part as one more variant."""
    rng = random.Random(seed)
    names = [*range(slots), BASE]
    match name:
        case "identical":
            return [0] * runs
        case "distinct":
            return [names[i % len(names)] for i in range(runs)]
        case "uniform":
            return rng.choices(names, k=runs)
        case "zipf":
            return rng.choices(names, weights=[1 / (i + 1) for i in range(len(names))], k=runs)
        case _:  # skewed: one variant has nearly everything
            return [0 if rng.random() < 0.9 else rng.choice(names) for _ in range(runs)]


def random_segments(name: str, runs: int, slots: int, seed: int) -> tuple[Segments, list[int]]:
    """Segments of 0 to 4 rows a run, and the slot of each row."""
    rng = random.Random(seed + 1)
    lengths = [rng.randrange(5) for _ in range(runs)]
    owners = mix(name, runs, slots, seed)
    return Segments.of(lengths, owners), [
        slot for length, slot in zip(lengths, owners, strict=True) for _ in range(length)
    ]


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """Relative root-mean-square error within ``TOLERANCE``, and no NaN."""
    assert not got.isnan().any(), f"{what}: NaN"
    error = (got.double() - expected).pow(2).mean().sqrt()
    size = expected.pow(2).mean().sqrt().clamp_min(1e-30)
    assert error <= TOLERANCE[dtype] * size, f"{what}: relative error {float(error / size):.2e}"
