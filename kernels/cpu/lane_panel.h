// Deltas for tiles with lanes: inputs are packed, vectors run over the rows of the batch, sums are turned at the end.
#pragma once

#include "low_rank.h"
#include "sparse.h"
#include "values.h"
#include "whole_rows.h"

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

// Rows from .. to of one delta for several tiles with lanes: what is decoded once serves them all.
struct LanePanel {
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
void sparse_tiles(const LanePanel& panel, const Part& part, int64_t p, int64_t first, int64_t blocks) {
    decode_lines(part.a, first, blocks, panel.scratch);
    for (int64_t i = 0; i < panel.count; ++i) {
        const Tile& tile = panel.tiles[i];
        float* sums = panel.sums_of(i, panel.from);
        if (tile.lanes == 8) sparse_tile<F8, Column>(part, first, blocks, panel.scratch, tile.inputs[p], sums);
        else sparse_tile<F16, Column>(part, first, blocks, panel.scratch, tile.inputs[p], sums);
    }
}

void add_sparse(const LanePanel& panel, const Part& part, int64_t p) {
    const int64_t first = panel.from / part.block, blocks = (panel.to - 1) / part.block + 1 - first;
    if (part.wide_columns) sparse_tiles<int32_t>(panel, part, p, first, blocks);
    else sparse_tiles<uint16_t>(panel, part, p, first, blocks);
}

void add_low_rank(const LanePanel& panel, const Part& part, int64_t p) {
    decode_columns(part, panel.from, panel.to, panel.scratch);
    for (int64_t i = 0; i < panel.count; ++i) {
        const Tile& tile = panel.tiles[i];
        float* sums = panel.sums_of(i, panel.from);
        if (tile.lanes == 8) low_rank_tile<F8>(part.kept, panel.to - panel.from, panel.scratch, tile.inputs[p], sums);
        else low_rank_tile<F16>(part.kept, panel.to - panel.from, panel.scratch, tile.inputs[p], sums);
    }
}

void add_line(const LanePanel& panel, const Part& part, int64_t line, int64_t row) {
    decode_line(part.a, line, panel.scratch);
    for (int64_t i = 0; i < panel.count; ++i)
        panel.add_product(row, panel.scratch, part.a.length, i, panel.tiles[i].x);
}

// What every row from .. to gets, in the tiles' sums.
void add_mean(const LanePanel& panel, int64_t p, int64_t from, int64_t to) {
    for (int64_t i = 0; i < panel.count; ++i) {
        const int lanes = panel.tiles[i].lanes;
        const float* products = panel.tiles[i].inputs[p];
        for (int64_t row = from; row < to; ++row)
            for (int t = 0; t < lanes; ++t) panel.sums_of(i, row)[t] += products[t];
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

void add_panel(const LanePanel& panel, const Matrix& y) {
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

} // namespace
} // namespace deltaserve
