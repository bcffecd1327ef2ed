// Products of whole decoded lines with a tile: what low-rank factors, dense parts and whole rows are made of.
#pragma once

#include "delta.h"

namespace deltaserve {
namespace {

// sums[0] += <line, x>, x [n]
inline void dot_single(const float* line, int64_t n, const float* x, float* sums) {
    F16 total[4] = {zero<F16>(), zero<F16>(), zero<F16>(), zero<F16>()};
    int64_t i = 0;
    for (; i + 63 < n; i += 64)
        for (int chain = 0; chain < 4; ++chain) {
            int64_t at = i + 16 * chain;
            total[chain] = fused(load<F16>(line + at), load<F16>(x + at), total[chain]);
        }
    for (; i + 15 < n; i += 16) total[0] = fused(load<F16>(line + i), load<F16>(x + i), total[0]);
    add_sums<1>(add(add(total[0], total[1]), add(total[2], total[3])), sums);
    for (; i < n; ++i) sums[0] += line[i] * x[i];
}

// sums[lanes] += line @ x, x [n, lanes]
template <class F> void dot_tile(const float* line, int64_t n, const float* x, float* sums) {
    F total[4] = {load<F>(sums), zero<F>(), zero<F>(), zero<F>()};
    auto step = [&](int64_t i, F& into) { into = fused(broadcast<F>(line[i]), load<F>(x + i * F::lanes), into); };
    int64_t i = 0;
    for (; i + 3 < n; i += 4)
        for (int chain = 0; chain < 4; ++chain) step(i + chain, total[chain]);
    for (; i < n; ++i) step(i, total[0]);
    store(sums, add(add(total[0], total[1]), add(total[2], total[3])));
}

inline void dot(const float* line, int64_t n, const float* x, int lanes, float* sums) {
    if (lanes == 1) dot_single(line, n, x, sums);
    else if (lanes == 8) dot_tile<F8>(line, n, x, sums);
    else dot_tile<F16>(line, n, x, sums);
}

// Index of the first of `count` ascending ids that is not below `row`.
inline int64_t first_at_or_after(const int64_t* ids, int64_t count, int64_t row) {
    int64_t low = 0;
    while (low < count) {
        int64_t middle = (low + count) / 2;
        if (ids[middle] < row) low = middle + 1;
        else count = middle;
    }
    return low;
}

} // namespace
} // namespace deltaserve
