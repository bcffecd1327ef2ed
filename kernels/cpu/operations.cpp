// The operations on one tile, panel, row or block. CMake compiles this file once for each instruction set, with
// DELTASERVE_ISA its name; everything but the table at the end has internal linkage, so that no inline function compiled for
// one instruction set can be linked into another's code.
#include "delta.h"

#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#define DELTASERVE_ROWS 16 // rows of a block whose sums fit in the registers
#include "simd_avx512.h"
#elif defined(__AVX2__)
#define DELTASERVE_ROWS 8
#include "simd_avx2.h"
#else
#if defined(__ARM_NEON)
#define DELTASERVE_ROWS 8
#else
#define DELTASERVE_ROWS 4
#endif
#define DELTASERVE_NATIVE 4
#include "simd_generic.h"
#endif
#define UNROLLED _Pragma("GCC unroll 8")
#include "codes.h"
#include "values.h"
#include "sparse.h"
#include "lines.h"
#include "low_rank.h"
#include "whole_rows.h"
#include "lane_panel.h"
#include "row_panel.h"
#include "product.h"
#include "attend.h"

namespace deltaserve {
namespace {

void project(const Tile& tile, int64_t p, int64_t line, int64_t lines, float* scratch) {
    const Part& part = tile.delta->parts[p];
    const float* values = part.mean;
    if (part.kind == Kind::low_rank) {
        decode_line(part.a, line, scratch);
        values = scratch;
    }
    if (tile.lanes > 1) {
        float* sums = tile.inputs[p] + line * tile.lanes;
        memset(sums, 0, tile.lanes * sizeof(float));
        return dot(values, tile.delta->width, tile.x, tile.lanes, sums);
    }
    for (int t = 0; t < tile.count; ++t) {
        float* sum = tile.inputs[p] + t * lines + line;
        *sum = 0;
        dot(values, tile.delta->width, tile.x + tile.rows[t] * tile.stride, 1, sum);
    }
}

void add(const Matrix& y, int64_t row, int64_t from, int64_t to, const float* addend) {
    with_dtype(y.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        add_to_row(row_of<T>(y, row) + from, addend + from, to - from);
    });
}

void rms_norm(const float* x, const float* weight, int64_t width, float epsilon, float offset, float* y) {
    F16 squares[2] = {zero<F16>(), zero<F16>()};
    int64_t i = 0;
    for (; i + 2 * CHUNK <= width; i += 2 * CHUNK)
        for (int chain = 0; chain < 2; ++chain) {
            const F16 values = load<F16>(x + i + chain * CHUNK);
            squares[chain] = fused(values, values, squares[chain]);
        }
    float sum = 0;
    add_sums<1>(add(squares[0], squares[1]), &sum);
    for (; i < width; ++i) sum += x[i] * x[i];
    const float factor = 1 / __builtin_sqrtf(sum / float(width) + epsilon);
    for (i = 0; i < width; ++i) y[i] = (weight[i] + offset) * (x[i] * factor);
}

void widen(const Matrix& x, int64_t row, float* to) {
    with_dtype(x.dtype, [&](auto* type) {
        const auto* from = row_of<std::remove_pointer_t<decltype(type)>>(x, row);
        for (int64_t column = 0; column < x.width; ++column) to[column] = to_float(from[column]);
    });
}

int64_t column_of(const Part& part, int64_t at) {
    return part.wide_columns ? static_cast<const int32_t*>(part.columns)[at]
                             : static_cast<const uint16_t*>(part.columns)[at];
}

// sum [in] += row `id` of the part
void add_embedding(const Part& part, int64_t width, int64_t id, float* sum, float* scratch) {
    auto add_line = [&](const float* line, float factor) {
        for (int64_t i = 0; i < width; ++i) sum[i] += factor * line[i];
    };
    switch (part.kind) {
        case Kind::sparse: {
            const int64_t block = id / part.block, within = id % part.block;
            decode_block(part, block, scratch);
            for (int64_t k = 0; k < part.kept; ++k)
                sum[column_of(part, block * part.kept + k)] += scratch[k * part.block + within];
            break;
        }
        case Kind::low_rank: {
            float* line = scratch + part.kept * PANEL;
            const int64_t within = id % CHUNK;
            decode_columns(part, id - within, id + 1, scratch);
            for (int64_t r = 0; r < part.kept; ++r) {
                decode_line(part.a, r, line);
                add_line(line, scratch[r * PANEL + within]);
            }
            break;
        }
        case Kind::dense:
            decode_line(part.a, id, scratch);
            add_line(scratch, 1);
            break;
        case Kind::rows: {
            const int64_t i = first_at_or_after(part.ids, part.kept, id);
            if (i < part.kept && part.ids[i] == id) {
                decode_line(part.a, i, scratch);
                add_line(scratch, 1);
            } else if (part.mean && id < part.mean_rows) {
                add_line(part.mean, 1);
            }
            break;
        }
    }
}

void embed(const Delta& delta, int64_t id, const Matrix& y, int64_t row, float* scratch) {
    float* sum = scratch;
    memset(sum, 0, delta.width * sizeof(float));
    for (int64_t p = 0; p < delta.count; ++p)
        add_embedding(delta.parts[p], delta.width, id, sum, scratch + delta.width + CHUNK);
    with_dtype(y.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        add_to_row(row_of<T>(y, row), sum, delta.width);
    });
}

constexpr int64_t AHEAD_ROWS = 4; // fetched before their turn: the touched lines of a row are too far apart to be guessed

// Row after row, because the columns of a row ascend: the memory is walked forwards.
template <class T, class Column>
void swap_in_block(const Matrix& weight, const Part& part, int64_t block, T* saved, const float* values) {
    const Column* columns = static_cast<const Column*>(part.columns) + block * part.kept;
    const int64_t first = block * part.block;
    for (int64_t v = 0; v < part.block && first + v < weight.rows; ++v) {
        T* row = row_of<T>(weight, first + v);
        T* kept = saved + (first + v) * part.kept;
        for (int64_t k = 0; k < part.kept; ++k) {
            __builtin_prefetch(row + columns[k] + AHEAD_ROWS * weight.stride, 1);
            kept[k] = row[columns[k]];
            row[columns[k]] = rounded<T>(to_float(kept[k]) + values[k * part.block + v]);
        }
    }
}

void swap_in(const Matrix& weight, const Part& part, int64_t block, void* saved, float* scratch) {
    decode_block(part, block, scratch);
    with_dtype(weight.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (part.wide_columns) swap_in_block<T, int32_t>(weight, part, block, static_cast<T*>(saved), scratch);
        else swap_in_block<T, uint16_t>(weight, part, block, static_cast<T*>(saved), scratch);
    });
}

template <class T, class Column>
void swap_out_block(const Matrix& weight, const Part& part, int64_t block, const T* saved) {
    const Column* columns = static_cast<const Column*>(part.columns) + block * part.kept;
    const int64_t first = block * part.block;
    for (int64_t v = 0; v < part.block && first + v < weight.rows; ++v) {
        T* row = row_of<T>(weight, first + v);
        const T* kept = saved + (first + v) * part.kept;
        for (int64_t k = 0; k < part.kept; ++k) {
            __builtin_prefetch(row + columns[k] + AHEAD_ROWS * weight.stride, 1);
            row[columns[k]] = kept[k];
        }
    }
}

void swap_out(const Matrix& weight, const Part& part, int64_t block, const void* saved) {
    with_dtype(weight.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (part.wide_columns) swap_out_block<T, int32_t>(weight, part, block, static_cast<const T*>(saved));
        else swap_out_block<T, uint16_t>(weight, part, block, static_cast<const T*>(saved));
    });
}

constexpr int LANES = DELTASERVE_ROWS == 16 ? 16 : 8;

} // namespace

#define DELTASERVE_JOIN(a, b) a##b
#define DELTASERVE_TABLE(isa) DELTASERVE_JOIN(operations_, isa)
#define DELTASERVE_TEXT(isa) #isa
#define DELTASERVE_NAME(isa) DELTASERVE_TEXT(isa)

const Operations DELTASERVE_TABLE(DELTASERVE_ISA) = {
    DELTASERVE_NAME(DELTASERVE_ISA), LANES, pack, project, pass_rows, product, add_by_rows, add_by_lanes, add, rms_norm, widen, embed, swap_in, swap_out,
    attend, merge, finish, rotate, gate_by_silu,
};

} // namespace deltaserve
