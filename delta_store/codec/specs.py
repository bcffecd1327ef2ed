"""Part specifications: everything about a part that its bytes do not say.

Outsiders write them, so each is checked in itself: kinds and codecs are known ones, sizes are in range and agree.
Whether a part's bytes fit its specification is checked before anything of that size is allocated (``parts.py``).
"""

from math import prod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deltaserve.kernels.codes import FLOAT_CODECS

SIDE_LIMIT = 1 << 20
"""Most rows or columns: four times the largest vocabulary known; a float32 vector of that many is 4 MiB."""

FACTORS_LIMIT = 1 << 26
"""Most numbers of two pruned factors, which are decoded whole (256 MiB): their file may be far smaller."""

Codec = Literal["float32", "bf16", "int8", "int4", "int2", "sign"]
Side = Annotated[int, Field(ge=1, le=SIDE_LIMIT)]
Matrix = tuple[Side, Side]
Vector = tuple[Side]
Group = Annotated[int, Field(ge=1, le=SIDE_LIMIT)]


class Model(BaseModel):
    """Frozen, strict, and without unknown fields: what a later version added must not be ignored by this one."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class SparseSpec(Model):
    """Blocks of ``block`` rows that share ``kept`` columns.

    A survivor is multiplied by its column's factor. ``uniform``: ``stratum * kept / width / divisor`` with the size of
    the column's stratum (so ``divisor`` is DAREx's q, and DARE's is ``kept / width``). ``weighted``: inverse inclusion
    probability / ``divisor``. ``explicit``: ``1 / divisor``. ``seed`` is None for explicit columns.

    There is a bfloat16 scale for each ``group`` values in ``[blocks, kept, block]`` order; ``group`` is a multiple of
    ``block``, and 1 for the float codecs, which have no scales.
    """

    kind: Literal["sparse"] = "sparse"
    shape: Matrix
    transposed: bool = False
    mask: Literal["uniform", "weighted", "explicit"]
    kept: Side
    block: Literal[1, 4, 8, 16, 32, 64]
    codec: Codec
    group: Group
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None
    divisor: Annotated[float, Field(ge=1e-6, le=1e6)]

    @property
    def blocks(self) -> int:
        return -(-self.shape[0] // self.block)

    @property
    def padding(self) -> int:
        """Rows of the last block beyond the weight's."""
        return self.blocks * self.block - self.shape[0]

    @model_validator(mode="after")
    def _agrees(self) -> "SparseSpec":
        if self.kept > self.shape[1]:
            raise ValueError(f"{self.kept} columns cannot be kept of {self.shape[1]}")
        if (self.seed is None) != (self.mask == "explicit"):
            raise ValueError("seeded masks have a seed, explicit ones have none")
        _check_group(self.codec, self.group, self.block)
        return self


class LowRankSpec(Model):
    """``b @ a``; ``a`` has a scale a row, ``b`` one for each ``group`` values: a multiple of ``rank``, 1 for floats."""

    kind: Literal["low_rank"] = "low_rank"
    shape: Matrix
    transposed: bool = False
    rank: Side
    codec: Codec
    group: Group

    @model_validator(mode="after")
    def _agrees(self) -> "LowRankSpec":
        if self.rank > min(self.shape):
            raise ValueError(f"rank {self.rank} exceeds the smaller side of {list(self.shape)}")
        _check_group(self.codec, self.group, self.rank)
        return self


class FactorsSpec(Model):
    """``b @ a`` of two pruned factors: ``a`` ``[rank, in]``, and ``b`` transposed, ``[rank, out]``.

    They are uniform sparse parts of block 1, drawn for ``<parameter>:a`` and ``<parameter>:b``. ``divisor`` is that of
    ``a``; the survivors of ``b`` are divided by their probability.
    """

    kind: Literal["factors"] = "factors"
    shape: Matrix
    transposed: bool = False
    rank: Side
    kept_a: Side
    kept_b: Side
    codec: Codec
    group: Group
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    divisor: Annotated[float, Field(ge=1e-6, le=1e6)]

    @property
    def a(self) -> SparseSpec:
        return self._sparse(self.shape[1], self.kept_a, self.divisor)

    @property
    def b(self) -> SparseSpec:
        """Of ``b`` transposed."""
        return self._sparse(self.shape[0], self.kept_b, self.kept_b / self.shape[0])

    def _sparse(self, width: int, kept: int, divisor: float) -> SparseSpec:
        return SparseSpec(
            shape=(self.rank, width),
            mask="uniform",
            kept=kept,
            block=1,
            codec=self.codec,
            group=self.group,
            seed=self.seed,
            divisor=divisor,
        )

    @model_validator(mode="after")
    def _agrees(self) -> "FactorsSpec":
        if self.rank * sum(self.shape) > FACTORS_LIMIT:
            raise ValueError(f"factors of rank {self.rank} for {list(self.shape)} exceed {FACTORS_LIMIT} numbers")
        _ = self.a, self.b
        return self


class DenseSpec(Model):
    """Every value, with a scale for each ``group`` (1 for the float codecs)."""

    kind: Literal["dense"] = "dense"
    shape: Matrix | Vector
    transposed: bool = False
    codec: Codec
    group: Group

    @model_validator(mode="after")
    def _agrees(self) -> "DenseSpec":
        _check_transposed(self.shape, self.transposed)
        _check_group(self.codec, self.group, 1)
        return self


class RowsSpec(Model):
    """``count`` whole rows, with a scale a row; ``has_mean``: one float32 row for all others below ``base_rows``."""

    kind: Literal["rows"] = "rows"
    shape: Matrix
    transposed: bool = False
    base_rows: Side
    count: Annotated[int, Field(ge=0, le=SIDE_LIMIT)]
    codec: Codec
    has_mean: bool

    @model_validator(mode="after")
    def _agrees(self) -> "RowsSpec":
        if max(self.count, self.base_rows) > self.shape[0]:
            raise ValueError(f"{self.count} rows, {self.base_rows} of the base, exceed the shape {list(self.shape)}")
        return self


class XorSpec(Model):
    """The fine-tune bit for bit: its bits XOR the base's, both in ``dtype``; rows the base lacks count as zeros."""

    kind: Literal["xor"] = "xor"
    shape: Matrix | Vector
    transposed: bool = False
    dtype: Literal["float32", "bfloat16", "float16"]

    @model_validator(mode="after")
    def _agrees(self) -> "XorSpec":
        _check_transposed(self.shape, self.transposed)
        return self

    @property
    def item_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def raw_bytes(self) -> int:
        return prod(self.shape) * self.item_bytes


Spec = Annotated[SparseSpec | LowRankSpec | FactorsSpec | DenseSpec | RowsSpec | XorSpec, Field(discriminator="kind")]


def _check_group(codec: str, group: int, unit: int) -> None:
    if codec in FLOAT_CODECS:
        if group != 1:
            raise ValueError(f"{codec} has no scales: its group is 1, not {group}")
    elif group % unit:
        raise ValueError(f"the group {group} is no multiple of {unit}")


def _check_transposed(shape: tuple[int, ...], transposed: bool) -> None:
    if transposed and len(shape) == 1:
        raise ValueError("only a matrix can be transposed")
