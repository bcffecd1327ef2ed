// The second factor of the low-rank part. It lies column after column, [r][rows], so that vectors run over output rows and
// nothing is summed across lanes; its scales, if it has any, are one a row, or one for `group` rows, a multiple of CHUNK.
#pragma once

#include "delta.h"

namespace deltaserve {
namespace {

// The scales of rows `row` .. row + CHUNK
template <Codec C> inline F16 row_scales(const Codes& b, int64_t row) {
    if constexpr (!has_scales<C>) return broadcast<F16>(1);
    if (b.group == 1) return decode<Codec::bf16>(reinterpret_cast<const uint8_t*>(b.scales + row));
    return broadcast<F16>(bf16_to_float(b.scales[row / b.group]));
}

// sums[to - from] += b[from .. to] @ inputs [r]; `from` is a multiple of CHUNK
template <Codec C> void low_rank_single(const Part& part, int64_t from, int64_t to, const float* inputs, float* sums) {
    for (int64_t row = from; row < to; row += CHUNK, sums += CHUNK) {
        const uint8_t* p = part.b.data + row / CHUNK * chunk_bytes<C>;
        F16 total = zero<F16>();
        for (int64_t r = 0; r < part.kept; ++r, p += part.b.line_bytes) total = fused(decode<C>(p), broadcast<F16>(inputs[r]), total);
        if constexpr (has_scales<C>) total = multiply(total, row_scales<C>(part.b, row));
        store(sums, add(load<F16>(sums), total));
    }
}
inline void low_rank_single(const Part& part, int64_t from, int64_t to, const float* inputs, float* sums) {
    with_codec(part.b.codec, [&](auto codec) { low_rank_single<decltype(codec)::value>(part, from, to, inputs, sums); });
}

// values [r][PANEL] = rows from .. to of b, transposed; `from` is a multiple of CHUNK
inline void decode_columns(const Part& part, int64_t from, int64_t to, float* values) {
    with_codec(part.b.codec, [&](auto codec) {
        constexpr Codec C = decltype(codec)::value;
        for (int64_t row = from; row < to; row += CHUNK) {
            const uint8_t* p = part.b.data + row / CHUNK * chunk_bytes<C>;
            const F16 scales = row_scales<C>(part.b, row);
            for (int64_t r = 0; r < part.kept; ++r, p += part.b.line_bytes) {
                F16 decoded = decode<C>(p);
                if constexpr (has_scales<C>) decoded = multiply(decoded, scales);
                store(values + r * PANEL + row - from, decoded);
            }
        }
    });
}

// sums[t][.. to - from] += b[from .. to] @ inputs[t] for some rows of the batch
inline void low_rank_rows(const Part& part, int64_t from, int64_t to, const float* inputs, int64_t count, float* const* sums, float* scratch) {
    if (count == 1) return low_rank_single(part, from, to, inputs, sums[0]);
    const float* x[MAX_TILE_ROWS];
    for (int64_t t = 0; t < count; ++t) x[t] = inputs + t * part.kept;
    decode_columns(part, from, to, scratch);
    for (int64_t row = from; row < to; row += CHUNK)
        add_chunk<ROWS_T>(scratch + row - from, PANEL, part.kept, Ascending{}, x, count, sums, row - from);
}

// sums[rows][lanes] += b @ inputs [r][lanes], b as decode_columns gives it
template <class F> void low_rank_tile(int64_t rank, int64_t rows, const float* values, const float* inputs, float* sums) {
    for (int64_t row = 0; row < rows; ++row, sums += F::lanes) {
        F total[2] = {load<F>(sums), zero<F>()};
        for (int64_t r = 0; r < rank; ++r)
            total[r % 2] = fused(broadcast<F>(values[r * PANEL + row]), load<F>(inputs + r * F::lanes), total[r % 2]);
        store(sums, add(total[0], total[1]));
    }
}

} // namespace
} // namespace deltaserve
