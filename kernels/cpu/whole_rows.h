// The part of whole rows, in panels of either kind: each has its own add_line and add_mean.
#pragma once

#include "delta.h"
#include "lines.h"

namespace deltaserve {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; } // not std's: see the head of operations.cpp

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

} // namespace
} // namespace deltaserve
