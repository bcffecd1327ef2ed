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

void cut(const Batch& batch, int lanes, std::vector<Tile>& tiles) {
    for (const Batch::Run& run : batch.runs)
        for (int64_t row = run.begin; row < run.end;) {
            const int64_t left = run.end - row;
            Tile tile{};
            tile.delta = run.delta;
            tile.rows = batch.rows.data() + row;
            tile.lanes = left < 4 ? 1 : left <= 8 ? 8 : lanes;
            tile.count = int32_t(std::min<int64_t>(left, tile.lanes));
            tiles.push_back(tile);
            row += tile.count;
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
    return std::max<int64_t>(delta.width + CHUNK, MAX_GROUP * PANEL * MAX_LANES) + most; // sums of embed or of panels
}

} // namespace deltaserve
