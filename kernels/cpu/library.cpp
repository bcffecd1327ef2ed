// The C interface of the CPU kernels; Python reaches it through ctypes (library.py). A call covers one layer and the whole
// batch. It checks everything before it writes anything; after that it cannot fail.
#include "batch.h"
#include "threads.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(_WIN32)
#define DELTASERVE_API extern "C" __declspec(dllexport)
#else
#define DELTASERVE_API extern "C" __attribute__((visibility("default")))
#endif

namespace deltaserve {
namespace {

constexpr double CYCLES_WORTH_A_THREAD = 15000; // waking a team costs about as much as this
constexpr int64_t WAVE_FLOATS = 1 << 21;        // packed inputs at a time, so that a long prefill needs no more memory
constexpr int64_t PACK_COLUMNS = 512;
constexpr int64_t SWAP_BLOCKS = 4;

int threads_for(double cycles) {
    return std::max(1, int(std::min<double>(most_threads(), cycles / CYCLES_WORTH_A_THREAD)));
}

// Memory that a calling thread keeps from call to call.
class Floats {
  public:
    Floats() = default;
    Floats(const Floats&) = delete;
    ~Floats() { std::free(memory); }
    float* reserve(int64_t floats) {
        if (floats > size) {
            std::free(memory);
            size = 0;
            const size_t bytes = (size_t(floats) * sizeof(float) + 63) / 64 * 64;
            memory = static_cast<float*>(std::aligned_alloc(64, bytes));
            if (!memory) throw std::bad_alloc();
            size = floats;
        }
        return memory;
    }

  private:
    float* memory = nullptr;
    int64_t size = 0;
};

// Consecutive tiles of one variant.
struct Group {
    const Tile* tiles;
    int64_t count;
};

struct Workspace {
    Batch batch;
    std::vector<Tile> tiles;
    std::vector<Group> groups;
    Floats inputs, scratch;
};
thread_local Workspace workspace;

int64_t aligned(int64_t floats) { return (floats + CHUNK - 1) / CHUNK * CHUNK; }

bool has_factors(const Part& part) { return part.kind == Kind::sparse && part.factors; }

int64_t projections(const Part& part) {
    return part.kind == Kind::low_rank ? part.kept : part.kind == Kind::rows && part.mean ? 1 : 0;
}

// One pass over some of a batch's tiles.
class Wave {
  public:
    Wave(const Operations& operations, const Matrix& y, const Matrix& x, Tile* tiles, int64_t count)
        : operations(operations), y(y), x(x), tiles(tiles), count(count) {
        int64_t floats = 0;
        for (int64_t i = 0; i < count; ++i) floats += lay_out(tiles[i], nullptr);
        float* memory = workspace.inputs.reserve(floats + 1); // never nullptr, which only counts
        workspace.groups.clear();
        for (int64_t i = 0; i < count; ++i) {
            memory += lay_out(tiles[i], memory);
            add_to_group(tiles + i);
        }
        threads = threads_for(cycles);
        scratch = workspace.scratch.reserve(scratch_size * threads);
    }

    void run() const {
        const int64_t parts_of_x = (x.width + PACK_COLUMNS - 1) / PACK_COLUMNS;
        if (packed_floats)
            share(threads_for(double(packed_floats)), count * parts_of_x, [&](int64_t i, int64_t end, int) {
                for (; i < end; ++i) pack(tiles[i / parts_of_x], i % parts_of_x * PACK_COLUMNS);
            });
        if (most_projections)
            share(threads, count * most_projections, [&](int64_t i, int64_t end, int thread) {
                for (; i < end; ++i) project(tiles[i / most_projections], i % most_projections, thread);
            });
        const std::vector<Group>& groups = workspace.groups;
        share(threads, int64_t(groups.size()) * panels, [&](int64_t i, int64_t end, int thread) {
            for (; i < end; ++i) {
                const Group& group = groups[i / panels];
                operations.panel(group.tiles, group.count, i % panels, y, scratch + thread * scratch_size);
            }
        });
    }

  private:
    // Points a tile at its share of `memory` (or only counts, for nullptr); returns the floats that it takes.
    int64_t lay_out(Tile& tile, float* memory) {
        int64_t taken = 0;
        auto take = [&](int64_t floats) {
            float* at = memory ? memory + taken : nullptr;
            taken += aligned(floats);
            return at;
        };
        auto take_packed = [&] {
            packed_floats += memory ? tile.lanes * x.width : 0;
            return take(tile.lanes * x.width);
        };
        const Part* parts = tile.delta->parts;
        const bool unscaled = !std::all_of(parts, parts + tile.delta->count, has_factors);
        tile.x_is_packed = unscaled && (tile.lanes > 1 || x.dtype != Dtype::float32);
        if (tile.x_is_packed) tile.x = take_packed();
        else tile.x = static_cast<float*>(x.data) + tile.rows[0] * x.stride;
        int64_t lines = 0;
        for (int64_t p = 0; p < tile.delta->count; ++p) {
            lines += projections(parts[p]);
            if (has_factors(parts[p])) tile.inputs[p] = take_packed();
            else if (projections(parts[p])) tile.inputs[p] = take(projections(parts[p]) * tile.lanes);
            else tile.inputs[p] = tile.x;
        }
        most_projections = std::max(most_projections, lines);
        panels = std::max(panels, (tile.delta->rows + PANEL - 1) / PANEL);
        scratch_size = std::max(scratch_size, aligned(scratch_floats(*tile.delta)));
        if (memory) cycles += tile.delta->cycles * (tile.lanes == 1 ? 1 : tile.lanes * 0.5);
        return taken;
    }

    static void add_to_group(const Tile* tile) {
        std::vector<Group>& groups = workspace.groups;
        if (!groups.empty() && groups.back().tiles->delta == tile->delta && groups.back().count < MAX_GROUP)
            ++groups.back().count;
        else groups.push_back({tile, 1});
    }

    void pack(const Tile& tile, int64_t from) const {
        const int64_t end = std::min(from + PACK_COLUMNS, x.width);
        if (tile.x_is_packed) operations.pack(tile, x, nullptr, from, end, tile.x);
        for (int64_t p = 0; p < tile.delta->count; ++p)
            if (has_factors(tile.delta->parts[p]))
                operations.pack(tile, x, tile.delta->parts[p].factors, from, end, tile.inputs[p]);
    }

    void project(const Tile& tile, int64_t line, int thread) const {
        for (int64_t p = 0; p < tile.delta->count; ++p) {
            const int64_t own = projections(tile.delta->parts[p]);
            if (line < own) return operations.project(tile, p, line, scratch + thread * scratch_size);
            line -= own;
        }
    }

    const Operations& operations;
    const Matrix &y, &x;
    Tile* tiles;
    int64_t count;
    int64_t packed_floats = 0, most_projections = 0, panels = 0, scratch_size = 0;
    double cycles = 0;
    int threads = 1;
    float* scratch = nullptr;
};

Error linear(const Operations& operations, const Matrix& y, const Matrix& x, const Bank& bank, const Segments& segments) {
    Workspace& own = workspace;
    if (x.rows != y.rows) return Error::segments;
    if (Error error = own.batch.plan(segments, bank, y.rows); error != Error::none) return error;
    for (const Batch::Run& run : own.batch.runs) {
        if (run.delta->width != x.width) return Error::input_width;
        if (run.delta->rows > y.width) return Error::output_width;
    }
    cut(own.batch, operations.lanes, own.tiles);
    const int64_t tiles_a_wave = std::max<int64_t>(1, WAVE_FLOATS / std::max<int64_t>(1, x.width * MAX_LANES));
    const int64_t count = int64_t(own.tiles.size());
    for (int64_t i = 0; i < count; i += tiles_a_wave)
        Wave(operations, y, x, own.tiles.data() + i, std::min(tiles_a_wave, count - i)).run();
    return Error::none;
}

Error embedding(const Operations& operations, const Matrix& y, const int64_t* ids, const Bank& bank,
                const Segments& segments) {
    Workspace& own = workspace;
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

// Only a delta of one sparse part has a short way; operations.py sees to the others.
Error swap(const Operations& operations, const Matrix& weight, const Delta& delta, void* saved, bool in) {
    if (delta.count != 1 || delta.parts[0].kind != Kind::sparse) return Error::shape;
    if (delta.rows != weight.rows || delta.width != weight.width) return Error::shape;
    const Part& part = delta.parts[0];
    const int64_t blocks = (delta.rows + part.block - 1) / part.block;
    const int threads = threads_for(double(delta.rows) * double(part.kept));
    const int64_t scratch_size = aligned(scratch_floats(delta));
    float* scratch = workspace.scratch.reserve(scratch_size * threads);
    share(threads, blocks, [&](int64_t b, int64_t end, int thread) {
        for (; b < end; ++b)
            if (in) operations.swap_in(weight, part, b, saved, scratch + thread * scratch_size);
            else operations.swap_out(weight, part, b, saved);
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
DELTASERVE_API int deltaserve_abi_version() { return 2; }

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

DELTASERVE_API int32_t deltaserve_linear(const void* operations, void* y, int64_t y_stride, int64_t y_rows, int64_t y_width,
                                         int32_t y_dtype, void* x, int64_t x_stride, int64_t x_rows, int64_t x_width,
                                         int32_t x_dtype, const Delta* const* deltas, int64_t slots,
                                         const int32_t* offsets, const int32_t* owners, int64_t segments) {
    const Matrix to{y, y_stride, y_rows, y_width, Dtype(y_dtype), 0}, from{x, x_stride, x_rows, x_width, Dtype(x_dtype), 0};
    return caught([&] {
        return linear(*static_cast<const Operations*>(operations), to, from, {deltas, slots}, {offsets, owners, segments});
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

DELTASERVE_API int32_t deltaserve_swap(const void* operations, void* weight, int64_t stride, int64_t rows, int64_t width,
                                       int32_t dtype, const Delta* delta, void* saved, int32_t in) {
    const Matrix matrix{weight, stride, rows, width, Dtype(dtype), 0};
    return caught([&] { return swap(*static_cast<const Operations*>(operations), matrix, *delta, saved, in != 0); });
}
