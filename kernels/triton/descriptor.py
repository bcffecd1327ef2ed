"""What the kernels find in a slot of a layer's table: int64 ``[1 + MAX_PARTS, FIELDS]``, first the delta's own row.

Addresses are device addresses. A delta's parts are lowered to three kinds:

========  ===========================================================================================
SPARSE    ``KEPT`` columns a block of ``1 << LOG_BLOCK`` rows, packed at ``COLUMNS``; values at ``CODES``
LINES     row ``o`` of the delta is line ``INDEX[o]`` of the values at ``CODES`` (none if negative; ``o`` if no index)
LOW_RANK  ``KEPT`` lines a ``[r, in]`` at ``CODES``, ``[out, r]`` at ``SECOND_CODES``; ``x @ a.T`` is kept in the
          columns from ``FIRST_RANK`` of a scratch tensor
========  ===========================================================================================

Packed numbers take ``1 << LOG_BITS`` bits each, from the lowest bits of a 32-bit word up. A value is its float32 or
bfloat16 bits, or ``(2 * code - TWICE_OFFSET) * SCALES[place >> LOG_GROUP]``.
"""

from triton.language import constexpr

MAX_PARTS = constexpr(8)
FIELDS = constexpr(16)

# the delta's own row; a bias delta float32 ``[BIAS_ROWS]`` is at ``BIAS``
PARTS, ROWS, WIDTH, BIAS, BIAS_ROWS = (constexpr(i) for i in range(5))

# a part's row
KIND, KEPT, LOG_BLOCK, FACTORS, COLUMNS, CODES, SECOND_CODES = (constexpr(i) for i in (0, 1, 2, 3, 4, 6, 11))
FIRST_RANK, INDEX = LOG_BLOCK, FACTORS

# from COLUMNS, CODES and SECOND_CODES on
DATA, LOG_BITS, SCALES, LOG_GROUP, TWICE_OFFSET = (constexpr(i) for i in range(5))

SPARSE, LINES, LOW_RANK = (constexpr(i) for i in range(3))
