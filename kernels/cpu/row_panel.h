// Deltas for tiles with one lane: inputs are read where they lie, vectors run over the rows of a delta.
#pragma once

#include "low_rank.h"
#include "sparse.h"
#include "values.h"
#include "whole_rows.h"

namespace deltaserve {
namespace {

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
    const int64_t most = tile.count == 1 ? MAX_TILE_ROWS * PANEL : PANEL; // so many sums of each row fit into scratch
    for (; panel.from < to; panel.from = panel.to) {
        panel.to = least(panel.from + most, to);
        const int64_t rows = panel.to - panel.from;
        const bool in_place = adds_in_place(*tile.delta, rows, y);
        for (int t = 0; t < tile.count; ++t)
            panel.sums[t] = in_place ? row_of<float>(y, tile.rows[t]) + panel.from : scratch + t * PANEL;
        if (!in_place) memset(scratch, 0, tile.count * least(most, (rows + PANEL - 1) / PANEL * PANEL) * sizeof(float));
        add_parts(panel);
        if (in_place) continue;
        with_dtype(y.dtype, [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            for (int t = 0; t < tile.count; ++t) add_to_row(row_of<T>(y, tile.rows[t]) + panel.from, panel.sums[t], rows);
        });
    }
}

} // namespace
} // namespace deltaserve
