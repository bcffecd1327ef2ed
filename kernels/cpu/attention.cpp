// See attention.h. The work is cut into (row, KEYS keys); a thread has a range of them. Shares of one row are put together in
// the order of its keys, whoever computed them: the result does not depend on the batch or on the number of threads.
#include "attention.h"
#include "batch.h"
#include "decoder.h"
#include "workspace.h"

#include <vector>

namespace deltaserve {
namespace {

struct Workspace {
    std::vector<int64_t> before; // [rows + 1]: shares of all rows before
    std::vector<char> torn;      // [rows]: whether more than one thread computes its shares
    Floats shares, scratch;
};
thread_local Workspace workspace;

} // namespace

Error check(const Attention& attention, const Pages& pages, int64_t rows) {
    if (attention.heads < 1 || attention.key_heads < 1 || attention.heads % attention.key_heads || pages.tokens < 1) return Error::shape;
    for (int64_t i = 0; i < pages.count; ++i)
        if (pages.starts[i] < 0 || pages.starts[i] > attention.cache_rows - pages.tokens) return Error::page;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t first = pages.first[row], length = pages.lengths[row];
        if (first < 0 || first > pages.count || length < 1 || (length - 1) / pages.tokens >= pages.count - first) return Error::page;
    }
    return Error::none;
}

void attend(const Operations& operations, const Attention& attention, const Pages& pages, const float* queries, float* out,
            int64_t rows) {
    const int64_t width = attention.heads * attention.head_width, size = aligned(2 * attention.heads + width);
    std::vector<int64_t>& before = workspace.before;
    before.assign(1, 0);
    double keys = 0;
    for (int64_t row = 0; row < rows; ++row) {
        before.push_back(before.back() + (pages.lengths[row] + KEYS - 1) / KEYS);
        keys += double(pages.lengths[row]);
    }
    workspace.torn.assign(rows, 1);
    const int64_t* starts = before.data();
    char* torn = workspace.torn.data();
    const int threads = threads_for(keys * double(width) / 4);
    const int64_t own = 2 * size + attention.heads * KEYS; // a thread's: a total, a share, scores
    float* scratch = workspace.scratch.reserve(own * threads);
    float* shares = workspace.shares.reserve(threads > 1 ? size * before.back() : 1); // only those of torn rows are touched
    share(threads, before.back(), [&](int64_t from, int64_t to, int thread) {
        float *total = scratch + thread * own, *next = total + size, *scores = next + size;
        for (int64_t row = std::upper_bound(starts, starts + rows, from) - starts - 1; from < to; ++row) {
            const int64_t end = std::min(starts[row + 1], to);
            const bool whole = starts[row] == from && starts[row + 1] == end;
            for (int64_t at = from; at < end; ++at) {
                float* into = whole ? at == from ? total : next : shares + at * size;
                operations.attend(attention, pages, row, (at - starts[row]) * KEYS, queries + row * width, into, scores);
                if (whole && at > from) operations.merge(attention, next, total);
            }
            if (whole) operations.finish(attention, total, out + row * width);
            if (whole) torn[row] = 0;
            from = end;
        }
    });
    for (int64_t row = 0; row < rows; ++row) { // at most one for each thread but the first
        if (!torn[row]) continue;
        float* total = shares + starts[row] * size;
        for (int64_t at = starts[row] + 1; at < starts[row + 1]; ++at) operations.merge(attention, shares + at * size, total);
        operations.finish(attention, total, out + row * width);
    }
}

} // namespace deltaserve
