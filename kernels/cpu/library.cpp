// The C interface of the CPU kernels; Python reaches it through ctypes (library.py). A call covers one layer, or several that
// share their input, and the whole batch. It checks everything before it writes anything; after that it cannot fail.
#include "batch.h"
#include "columns.h"
#include "decoder.h"
#include "linear.h"
#include "workspace.h"

#include <cstring>

#if defined(_WIN32)
#define DELTASERVE_API extern "C" __declspec(dllexport)
#else
#define DELTASERVE_API extern "C" __attribute__((visibility("default")))
#endif

namespace deltaserve {
namespace {

struct Workspace {
    Batch batch;
    Floats scratch;
};
thread_local Workspace workspace;

Error embedding(const Operations& operations, const Matrix& y, const int64_t* ids, const Bank& bank,
                const Segments& segments) {
    Workspace& own = workspace; // the calling thread's
    if (Error error = own.batch.plan(segments, bank, y.rows); error != Error::none) return error;
    int64_t scratch_size = 0;
    double cycles = 0;
    for (const Batch::Run& run : own.batch.runs) {
        if (run.delta->width != y.width) return Error::output_width;
        scratch_size = std::max(scratch_size, aligned(scratch_floats(*run.delta)));
        cycles += double(run.end - run.begin) * double(run.delta->width) * 2;
        for (int64_t i = run.begin; i < run.end; ++i) {
            const int64_t id = ids[own.batch.rows[i]];
            if (id < 0 || id >= run.delta->rows) return Error::id;
        }
    }
    const int threads = threads_for(cycles);
    float* scratch = own.scratch.reserve(scratch_size * threads);
    for (const Batch::Run& run : own.batch.runs)
        share(threads, run.end - run.begin, [&](int64_t i, int64_t end, int thread) {
            for (; i < end; ++i) {
                const int64_t row = own.batch.rows[run.begin + i];
                operations.embed(*run.delta, ids[row], y, row, scratch + thread * scratch_size);
            }
        });
    return Error::none;
}

int64_t blocks_of(const Swap& swap) {
    const int64_t block = swap.delta->parts[0].block;
    return (swap.delta->rows + block - 1) / block;
}

// Only a delta of one sparse part has a short way; operations.py sees to the others.
Error swap_all(const Operations& operations, const Swap* swaps, int64_t count, bool in) {
    int64_t scratch_size = 0, blocks = 0;
    double cycles = 0;
    for (int64_t i = 0; i < count; ++i) {
        const Delta& delta = *swaps[i].delta;
        if (delta.count != 1 || delta.parts[0].kind != Kind::sparse) return Error::shape;
        if (delta.rows != swaps[i].weight.rows || delta.width != swaps[i].weight.width) return Error::shape;
        scratch_size = std::max(scratch_size, aligned(scratch_floats(delta)));
        blocks += blocks_of(swaps[i]);
        cycles += double(delta.rows) * double(delta.parts[0].kept) * 8; // each a cache line of its own
    }
    const int threads = threads_for(cycles);
    float* scratch = workspace.scratch.reserve(scratch_size * threads);
    share(threads, blocks, [&](int64_t begin, int64_t end, int thread) {
        int64_t before = 0;
        for (const Swap* swap = swaps; swap != swaps + count; before += blocks_of(*swap), ++swap) {
            const int64_t last = std::min(end - before, blocks_of(*swap));
            for (int64_t b = std::max<int64_t>(begin - before, 0); b < last; ++b)
                if (in) operations.swap_in(swap->weight, swap->delta->parts[0], b, swap->saved, scratch + thread * scratch_size);
                else operations.swap_out(swap->weight, swap->delta->parts[0], b, swap->saved);
        }
    });
    return Error::none;
}

template <class Run> int32_t caught(Run run) {
    try {
        return int32_t(run());
    } catch (const std::bad_alloc&) {
        return int32_t(Error::memory);
    }
}

} // namespace
} // namespace deltaserve

using namespace deltaserve;

// Raised whenever a signature or struct changes; library.py refuses to load a library of another version.
DELTASERVE_API int deltaserve_abi_version() { return 7; }

// The operations for an instruction set, or nullptr where this machine or this build has it not.
DELTASERVE_API const void* deltaserve_operations(const char* name) {
#if defined(DELTASERVE_X86)
    __builtin_cpu_init();
    if (!std::strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                   ? &operations_avx512
                   : nullptr;
    if (!std::strcmp(name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
                   ? &operations_avx2
                   : nullptr;
#endif
#if defined(__ARM_NEON)
    if (!std::strcmp(name, "neon")) return &operations_portable; // the compiler's vectors are NEON's there
#endif
    return std::strcmp(name, "portable") ? nullptr : &operations_portable;
}

// y of several layers: one layer's rows after the other's, each layer's columns contiguous (y_stride is then not used).
DELTASERVE_API int32_t deltaserve_linear(const void* operations, const Layer* layers, int64_t count, void* y,
                                         int64_t y_stride, int64_t y_rows, int64_t y_width, int32_t y_dtype, void* x,
                                         int64_t x_stride, int64_t x_rows, int64_t x_width, int32_t x_dtype,
                                         const int32_t* offsets, const int32_t* owners, int64_t segments) {
    const Matrix to{y, y_stride, y_rows, y_width, Dtype(y_dtype), 0}, from{x, x_stride, x_rows, x_width, Dtype(x_dtype), 0};
    return caught([&] {
        return linear(*static_cast<const Operations*>(operations), layers, count, to, from, {offsets, owners, segments});
    });
}

DELTASERVE_API int32_t deltaserve_embedding(const void* operations, void* y, int64_t y_stride, int64_t y_rows,
                                            int64_t y_width, int32_t y_dtype, const int64_t* ids,
                                            const Delta* const* deltas, int64_t slots, const int32_t* offsets,
                                            const int32_t* owners, int64_t segments) {
    const Matrix to{y, y_stride, y_rows, y_width, Dtype(y_dtype), 0};
    return caught([&] {
        return embedding(*static_cast<const Operations*>(operations), to, ids, {deltas, slots},
                         {offsets, owners, segments});
    });
}

// y, x [rows * heads, width]; row t's heads share weight row places[t] of `table` [entries, width], 0 where places is nullptr.
DELTASERVE_API int32_t deltaserve_rms_norm(const void* operations, float* y, const float* x, int64_t rows, int64_t heads,
                                           int64_t width, const float* table, int64_t entries, const int64_t* places,
                                           float epsilon, float offset) {
    for (int64_t row = 0; places && row < rows; ++row)
        if (places[row] < 0 || places[row] >= entries) return int32_t(Error::slot);
    const Operations& own = *static_cast<const Operations*>(operations);
    share(threads_for(double(rows * heads * width) / 4), rows, [&](int64_t row, int64_t end, int) {
        for (; row < end; ++row)
            for (int64_t head = row * heads; head < (row + 1) * heads; ++head)
                own.rms_norm(x + head * width, table + (places ? places[row] : 0) * width, width, epsilon, offset, y + head * width);
    });
    return int32_t(Error::none);
}

// queries, out [rows, heads * head_width]
DELTASERVE_API int32_t deltaserve_attend(const void* operations, const Attention* attention, const Pages* pages,
                                         const float* queries, float* out, int64_t rows) {
    return caught([&] {
        if (Error error = check(*attention, *pages, rows); error != Error::none) return error;
        attend(*static_cast<const Operations*>(operations), *attention, *pages, queries, out, rows);
        return Error::none;
    });
}

// x [rows, width] through the blocks, in place
DELTASERVE_API int32_t deltaserve_decode(const void* operations, const Block* blocks, int64_t count, const Step* step, float* x,
                                         int64_t rows) {
    return caught([&] { return decode(*static_cast<const Operations*>(operations), blocks, count, *step, x, rows); });
}

DELTASERVE_API int32_t deltaserve_swap(const void* operations, const Swap* swaps, int64_t count, int32_t in) {
    return caught([&] { return swap_all(*static_cast<const Operations*>(operations), swaps, count, in != 0); });
}

// columns [blocks, kept], kept <= width
DELTASERVE_API int32_t deltaserve_uniform_columns(uint32_t key, uint32_t second_key, int64_t blocks, int64_t width, int64_t kept,
                                                  int32_t* columns) {
    return caught([&] {
        uniform_columns(key, second_key, blocks, width, kept, columns);
        return Error::none;
    });
}

// weights, factors [width]
DELTASERVE_API int32_t deltaserve_weighted_columns(const int64_t* weights, uint32_t key, uint32_t second_key, int64_t blocks,
                                                   int64_t width, int64_t kept, int32_t* columns, float* factors) {
    return caught([&] {
        const bool drawn = weighted_columns(weights, key, second_key, blocks, width, kept, columns, factors);
        return drawn ? Error::none : Error::columns;
    });
}

// `to` is 32 bits wide where width is more than 16 bits hold
DELTASERVE_API int32_t deltaserve_keep_columns(const int32_t* columns, int64_t blocks, int64_t width, int64_t kept, void* to) {
    const bool kept_all = width > 1 << 16 ? keep_columns(columns, blocks, width, kept, static_cast<int32_t*>(to))
                                          : keep_columns(columns, blocks, width, kept, static_cast<uint16_t*>(to));
    return int32_t(kept_all ? Error::none : Error::columns);
}
