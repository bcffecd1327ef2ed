// A batch's segment table, checked and cut into tiles: rows of one variant together, wherever they stand in the batch.
#pragma once

#include "delta.h"

#include <vector>

namespace deltaserve {

// What operations.py turns into exceptions.
enum class Error : int32_t { none, segments, slot, input_width, output_width, id, memory, shape, page, columns };

struct Segments {
    const int32_t* offsets; // [count + 1]
    const int32_t* slots;   // [count], -1 for the base
    int64_t count;
};

struct Bank {
    const Delta* const* deltas; // [slots], nullptr where a variant leaves the layer as it is
    int64_t slots;
};

// Rows of the batch in the order of their slots, base and absent deltas left out.
struct Batch {
    struct Run {
        const Delta* delta;
        int64_t begin, end; // in `rows`
    };
    std::vector<int32_t> rows;
    std::vector<Run> runs;
    std::vector<int64_t> ends; // scratch of plan: by slot

    // The table must cover [0, total) in ascending order and name slots of the bank; none at all is all the base's.
    Error plan(const Segments& segments, const Bank& bank, int64_t total);
};

// Appends tiles. Those with one lane have rows of one pass over the batch, `pass` rows at a time. With blocks that are narrower
// than a vector, few rows are cheaper one by one: a tile's `lanes` are paid for whether used or not.
void cut(const Batch& batch, int lanes, int64_t pass, std::vector<Tile>& tiles);

// Floats that the operations need as scratch for this delta, a thread.
int64_t scratch_floats(const Delta& delta);

} // namespace deltaserve
