"""What a decoded delta is made of: the sum of parts that every kernel backend understands.

A weight is ``[out, in]`` (``y = x @ weight.T``; an embedding is ``[vocabulary, width]``), a bias or norm ``[n]``.
Coded values stay packed (see ``codes.py``) until a backend lays them out for itself with its ``prepare``.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """Packed values with shared scales; ``codes.decode`` gives them back as float32 of ``shape``.

    ``data`` is bfloat16 or float32 ``[n]`` for the codecs of those names, else uint8 bytes. ``scales`` is bfloat16, one
    for each run of ``group`` consecutive values, and empty for the float codecs.
    """

    codec: str
    shape: tuple[int, ...]
    data: Tensor
    scales: Tensor
    group: int


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """Blocks of ``V`` consecutive rows; the rows of a block share ``K`` kept columns.

    ``columns`` int32 ``[blocks, K]``, ascending in a block, ``blocks = ceil(out / V)``; ``values`` has shape
    ``(blocks, K, V)``, and what it holds for rows beyond ``out`` means nothing. ``factors`` float32 ``[in]`` multiplies
    each survivor by the number at its column: the inverse of that column's inclusion probability (for DARE the size of
    its stratum).
    """

    shape: tuple[int, int]
    columns: Tensor
    values: Codes
    factors: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """``b @ a`` with ``a`` of shape ``(r, in)`` and ``b`` of shape ``(out, r)``."""

    shape: tuple[int, int]
    a: Codes
    b: Codes


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """Every value of a weight ``[out, in]`` or of a bias or norm ``[n]``."""

    shape: tuple[int, ...]
    values: Codes


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Whole rows: row ``ids[i]`` holds ``values[i]``, every other row below ``mean_rows`` holds ``mean``.

    ``ids`` int64 ``[n]`` ascending; ``values`` of shape ``(n, in)``; ``mean`` float32 ``[in]`` or None. Rows of an
    added vocabulary are rows at or beyond ``mean_rows`` (the base's row count): there the base's row counts as zero.
    """

    shape: tuple[int, int]
    ids: Tensor
    values: Codes
    mean: Tensor | None
    mean_rows: int


Part = Sparse | LowRank | Dense | Rows


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """The difference of one weight from the base's: the sum of ``parts``, each of this ``shape``.

    ``shape`` is the fine-tune's; its first number is larger than the base's where rows were added.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
