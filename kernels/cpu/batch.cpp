// See batch.h.
#include "batch.h"

#include <algorithm>

namespace deltaserve {

Error Batch::plan(const Segments& segments, const Bank& bank, int64_t total) {
    rows.clear();
    runs.clear();
    ends.assign(bank.slots, 0);
    if (!segments.count) return Error::none; // all rows are the base's
    if (segments.offsets[0] != 0 || segments.offsets[segments.count] != total) return Error::segments;
    for (int64_t i = 0; i < segments.count; ++i) {
        const int32_t slot = segments.slots[i];
        if (segments.offsets[i] > segments.offsets[i + 1]) return Error::segments;
        if (slot < -1 || slot >= bank.slots) return Error::slot;
        if (slot >= 0 && bank.deltas[slot]) ends[slot] += segments.offsets[i + 1] - segments.offsets[i];
    }
    int64_t filled = 0;
    for (int64_t slot = 0; slot < bank.slots; ++slot) {
        if (ends[slot] > 0) runs.push_back({bank.deltas[slot], filled, filled + ends[slot]});
        filled += ends[slot];
        ends[slot] = filled - ends[slot]; // where the slot's next row goes
    }
    rows.resize(filled);
    for (int64_t i = 0; i < segments.count; ++i) {
        const int32_t slot = segments.slots[i];
        if (slot < 0 || !bank.deltas[slot]) continue;
        for (int32_t row = segments.offsets[i]; row < segments.offsets[i + 1]; ++row) rows[ends[slot]++] = row;
    }
    return Error::none;
}

namespace {

bool has_narrow_blocks(const Delta& delta) {
    return std::any_of(delta.parts, delta.parts + delta.count,
                       [](const Part& part) { return part.kind == Kind::sparse && part.block < CHUNK; });
}

// How many of the rows from `row` on, at most `end`, are of the same pass.
int64_t rows_of_pass(const Batch& batch, int64_t row, int64_t end, int64_t pass) {
    int64_t next = row + 1;
    while (next < end && batch.rows[next] / pass == batch.rows[row] / pass) ++next;
    return std::min<int64_t>(next - row, MAX_TILE_ROWS);
}

} // namespace

void cut(const Batch& batch, int lanes, int64_t pass, std::vector<Tile>& tiles) {
    for (const Batch::Run& run : batch.runs) {
        const bool narrow = has_narrow_blocks(*run.delta);
        for (int64_t row = run.begin; row < run.end;) {
            const int64_t left = run.end - row;
            Tile tile{};
            tile.delta = run.delta;
            tile.rows = batch.rows.data() + row;
            tile.lanes = !narrow || left < 4 ? 1 : left <= 8 ? 8 : lanes;
            if (tile.lanes > 1) tile.count = int32_t(std::min<int64_t>(left, tile.lanes));
            else tile.count = narrow ? 1 : int32_t(rows_of_pass(batch, row, run.end, pass));
            tiles.push_back(tile);
            row += tile.count;
        }
    }
}

int64_t scratch_floats(const Delta& delta) {
    int64_t most = 0;
    for (int64_t p = 0; p < delta.count; ++p) {
        const Part& part = delta.parts[p];
        const int64_t lines = part.kind == Kind::sparse ? PANEL / part.block : 1;
        const int64_t columns = part.kind == Kind::low_rank ? part.kept * PANEL : 0;
        most = std::max(most, lines * (part.a.length + CHUNK) + columns);
    }
    constexpr int64_t panels = std::max(MAX_GROUP * MAX_LANES, MAX_TILE_ROWS) * PANEL;
    return std::max<int64_t>(delta.width + CHUNK, panels) + most; // sums of embed or of panels
}

} // namespace deltaserve
