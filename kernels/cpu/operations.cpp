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
#include "product.h"
#include "attend.h"

namespace deltaserve {
namespace {

// to[column, lanes] = the tile's rows of x times `factors` (nullptr: 1), lanes beyond its rows zero. 4 rows x 4 columns at a
// time, so that neither reads nor writes are scattered.
template <class T>
void pack_tile(const Tile& tile, const Matrix& x, const float* factors, int64_t from, int64_t end, float* to) {
    const int lanes = tile.lanes;
    for (int t = 0; t < lanes; t += 4) {
        const T* rows[4];
        for (int i = 0; i < 4; ++i) rows[i] = t + i < tile.count ? row_of<T>(x, tile.rows[t + i]) : nullptr;
        int64_t column = from;
        for (; column + 3 < end; column += 4) {
            Four square[4];
            for (int i = 0; i < 4; ++i) square[i] = rows[i] ? load4(rows[i] + column) : Four{};
            transpose4(square);
            for (int i = 0; i < 4; ++i) {
                if (factors) square[i] *= factors[column + i];
                memcpy(to + (column + i) * lanes + t, &square[i], sizeof(Four));
            }
        }
        for (; column < end; ++column)
            for (int i = 0; i < 4; ++i) {
                const float value = rows[i] ? to_float(rows[i][column]) : 0;
                to[column * lanes + t + i] = factors ? value * factors[column] : value;
            }
    }
}

void pack(const Tile& tile, const Matrix& x, const float* factors, int64_t from, int64_t end, float* to) {
    with_dtype(x.dtype, [&](auto* type) { pack_tile<std::remove_pointer_t<decltype(type)>>(tile, x, factors, from, end, to); });
}

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

// Rows from .. to of one delta for several tiles with lanes: what is decoded once serves them all.
struct Panel {
    const Tile* tiles;
    int64_t count;
    int64_t from, to;
    float* sums;    // [count][PANEL * MAX_LANES], a tile's as [to - from, lanes]
    float* scratch; // for decoded values

    float* sums_of(int64_t tile, int64_t row) const {
        return sums + tile * PANEL * MAX_LANES + (row - from) * tiles[tile].lanes;
    }
    void add_product(int64_t row, const float* line, int64_t n, int64_t tile, const float* x) const {
        dot(line, n, x, tiles[tile].lanes, sums_of(tile, row));
    }
};

template <class Column>
void sparse_tiles(const Panel& panel, const Part& part, int64_t p, int64_t first, int64_t blocks) {
    bool decoded = false;
    for (int64_t i = 0; i < panel.count; ++i) {
        const Tile& tile = panel.tiles[i];
        float* sums = panel.sums_of(i, panel.from);
        if (!decoded) decode_lines(part.a, first, blocks, panel.scratch);
        decoded = true;
        if (tile.lanes == 8) sparse_tile<F8, Column>(part, first, blocks, panel.scratch, tile.inputs[p], sums);
        else sparse_tile<F16, Column>(part, first, blocks, panel.scratch, tile.inputs[p], sums);
    }
}

void add_sparse(const Panel& panel, const Part& part, int64_t p) {
    const int64_t first = panel.from / part.block, blocks = (panel.to - 1) / part.block + 1 - first;
    if (part.wide_columns) sparse_tiles<int32_t>(panel, part, p, first, blocks);
    else sparse_tiles<uint16_t>(panel, part, p, first, blocks);
}

void add_low_rank(const Panel& panel, const Part& part, int64_t p) {
    bool decoded = false;
    for (int64_t i = 0; i < panel.count; ++i) {
        const Tile& tile = panel.tiles[i];
        float* sums = panel.sums_of(i, panel.from);
        if (!decoded) decode_columns(part, panel.from, panel.to, panel.scratch);
        decoded = true;
        if (tile.lanes == 8) low_rank_tile<F8>(part.kept, panel.to - panel.from, panel.scratch, tile.inputs[p], sums);
        else low_rank_tile<F16>(part.kept, panel.to - panel.from, panel.scratch, tile.inputs[p], sums);
    }
}

void add_line(const Panel& panel, const Part& part, int64_t line, int64_t row) {
    decode_line(part.a, line, panel.scratch);
    for (int64_t i = 0; i < panel.count; ++i)
        panel.add_product(row, panel.scratch, part.a.length, i, panel.tiles[i].x);
}

// What every row from .. to gets, in the tiles' sums.
void add_mean(const Panel& panel, int64_t p, int64_t from, int64_t to) {
    for (int64_t i = 0; i < panel.count; ++i) {
        const int lanes = panel.tiles[i].lanes;
        const float* products = panel.tiles[i].inputs[p];
        for (int64_t row = from; row < to; ++row)
            for (int t = 0; t < lanes; ++t) panel.sums_of(i, row)[t] += products[t];
    }
}

// Rows from .. to of one delta for a tile with one lane.
struct RowPanel {
    RowPanel(const Tile& tile, int64_t from, int64_t to, float* scratch) : tile(tile), from(from), to(to), scratch(scratch) {}

    const Tile& tile;
    int64_t from, to;
    float* scratch; // for decoded values
    const float* x[MAX_TILE_ROWS];
    float* sums[MAX_TILE_ROWS]; // [to - from] each
};

void add_line(const RowPanel& panel, const Part& part, int64_t line, int64_t row) {
    decode_line(part.a, line, panel.scratch);
    for (int t = 0; t < panel.tile.count; ++t) dot(panel.scratch, part.a.length, panel.x[t], 1, panel.sums[t] + row - panel.from);
}

void add_mean(const RowPanel& panel, int64_t p, int64_t from, int64_t to) {
    for (int t = 0; t < panel.tile.count; ++t)
        for (int64_t row = from; row < to; ++row) panel.sums[t][row - panel.from] += panel.tile.inputs[p][t];
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; } // not std's: see the head of this file

template <class AnyPanel> void add_rows(const AnyPanel& panel, const Part& part, int64_t p) {
    const int64_t mean_end = part.mean ? least(panel.to, part.mean_rows) : 0;
    int64_t row = panel.from;
    for (int64_t next = first_at_or_after(part.ids, part.kept, row); row < panel.to; ++row, ++next) {
        const int64_t stored = next < part.kept && part.ids[next] < panel.to ? part.ids[next] : panel.to;
        if (row < mean_end) add_mean(panel, p, row, least(stored, mean_end));
        row = stored;
        if (row < panel.to) add_line(panel, part, next, row);
    }
}

// y[tile's rows, from .. to] += sums [to - from, lanes], rounded once
void add_sums_to_rows(const Tile& tile, const Matrix& y, int64_t from, int64_t to, const float* sums) {
    float turned[MAX_LANES][PANEL];
    for (int t = 0; t < tile.lanes; t += 4)
        for (int r = 0; r < PANEL; r += 4) {
            Four square[4];
            for (int i = 0; i < 4; ++i) square[i] = load4(sums + (r + i) * tile.lanes + t);
            transpose4(square);
            for (int i = 0; i < 4; ++i) memcpy(&turned[t + i][r], &square[i], sizeof(Four));
        }
    with_dtype(y.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (int t = 0; t < tile.count; ++t) add_to_row(row_of<T>(y, tile.rows[t]) + from, turned[t], to - from);
    });
}

void add_panel(const Panel& panel, const Matrix& y) {
    const Delta& delta = *panel.tiles->delta;
    for (int64_t i = 0; i < panel.count; ++i) memset(panel.sums_of(i, panel.from), 0, PANEL * panel.tiles[i].lanes * sizeof(float));
    for (int64_t p = 0; p < delta.count; ++p) {
        const Part& part = delta.parts[p];
        switch (part.kind) {
            case Kind::sparse: add_sparse(panel, part, p); break;
            case Kind::low_rank: add_low_rank(panel, part, p); break;
            case Kind::dense:
                for (int64_t row = panel.from; row < panel.to; ++row) add_line(panel, part, row, row);
                break;
            case Kind::rows: add_rows(panel, part, p); break;
        }
    }
    for (int64_t i = 0; i < panel.count; ++i)
        add_sums_to_rows(panel.tiles[i], y, panel.from, panel.to, panel.sums_of(i, panel.from));
}

void add_by_lanes(const Tile* tiles, int64_t count, int64_t from, int64_t to, const Matrix& y, float* scratch) {
    for (int64_t row = from; row < to; row += PANEL)
        add_panel({tiles, count, row, least(row + PANEL, to), scratch, scratch + count * PANEL * MAX_LANES}, y);
}

// Whether rows of y can be summed up where they are: nothing to round, and no part computes rows beyond them.
bool adds_in_place(const Delta& delta, int64_t rows, const Matrix& y) {
    for (int64_t p = 0; p < delta.count; ++p)
        if (rows % CHUNK || (delta.parts[p].kind == Kind::sparse && rows % delta.parts[p].block)) return false;
    return y.dtype == Dtype::float32;
}

void add_parts(const RowPanel& panel) {
    const Delta& delta = *panel.tile.delta;
    for (int64_t p = 0; p < delta.count; ++p) {
        const Part& part = delta.parts[p];
        switch (part.kind) {
            case Kind::sparse: {
                const int64_t first = panel.from / part.block, blocks = (panel.to - 1) / part.block + 1 - first;
                sparse_rows(part, first, blocks, panel.x, panel.tile.count, panel.sums, panel.scratch);
                break;
            }
            case Kind::low_rank:
                low_rank_rows(part, panel.from, panel.to, panel.tile.inputs[p], panel.tile.count, panel.sums, panel.scratch);
                break;
            case Kind::dense:
                for (int64_t row = panel.from; row < panel.to; ++row) add_line(panel, part, row, row);
                break;
            case Kind::rows: add_rows(panel, part, p); break;
        }
    }
}

void add_by_rows(const Tile& tile, int64_t from, int64_t to, const Matrix& y, float* scratch) {
    RowPanel panel(tile, from, to, scratch + MAX_TILE_ROWS * PANEL);
    for (int t = 0; t < tile.count; ++t) panel.x[t] = tile.x + tile.rows[t] * tile.stride;
    for (; panel.from < to; panel.from = panel.to) {
        panel.to = least(panel.from + PANEL, to);
        const int64_t rows = panel.to - panel.from;
        const bool in_place = adds_in_place(*tile.delta, rows, y);
        for (int t = 0; t < tile.count; ++t)
            panel.sums[t] = in_place ? row_of<float>(y, tile.rows[t]) + panel.from : scratch + t * PANEL;
        if (!in_place) memset(scratch, 0, tile.count * PANEL * sizeof(float));
        add_parts(panel);
        if (in_place) continue;
        with_dtype(y.dtype, [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            for (int t = 0; t < tile.count; ++t) add_to_row(row_of<T>(y, tile.rows[t]) + panel.from, panel.sums[t], rows);
        });
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
