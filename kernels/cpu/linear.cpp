// See linear.h. The work is cut by output rows: a thread has a range of them, computes the base's product for some, then adds
// what each variant's tiles of the batch get, while these outputs are in the nearest cache.
#include "linear.h"
#include "workspace.h"

#include <vector>

namespace deltaserve {
namespace {

constexpr int64_t WAVE_FLOATS = 1 << 21; // packed inputs at a time, so that a long prefill needs no more memory
constexpr int64_t PACK_COLUMNS = 512;
constexpr int64_t STRIP = 512;           // output rows of the base's product before their deltas are added

// Consecutive tiles of one variant.
struct Group {
    Tile* tiles;
    int64_t count;
};

// A layer of the call, its part of y, its tiles and groups in the workspace.
struct Planned {
    const Layer* layer;
    Matrix y;
    int64_t rows;  // of y that are written: a variant's added vocabulary makes them more than the layer's
    int64_t first_tile, tiles;
    int64_t first_group, groups;
};

struct Workspace {
    std::vector<Planned> layers;
    std::vector<Batch> batches;
    std::vector<Tile> tiles;
    std::vector<Group> groups;
    Floats wide, inputs, scratch;
};
thread_local Workspace workspace;

bool has_factors(const Part& part) { return part.kind == Kind::sparse && part.factors; }

int64_t projections(const Part& part) {
    return part.kind == Kind::low_rank ? part.kept : part.kind == Kind::rows && part.mean ? 1 : 0;
}

int64_t value_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Some of the planned layers with some of their tiles.
class Wave {
  public:
    Wave(const Operations& operations, const Matrix& x, const Segments& segments, Planned* layers, int64_t count, bool first)
        : operations(operations), x(x), segments(segments), layers(layers), count(count), first(first) {
        Tile* tiles = workspace.tiles.data();
        first_tile = layers[0].first_tile, last_tile = layers[count - 1].first_tile + layers[count - 1].tiles;
        int64_t floats = 0;
        for (int64_t i = first_tile; i < last_tile; ++i) floats += lay_out(tiles[i], nullptr);
        float* memory = workspace.inputs.reserve(floats + 1); // never nullptr, which only counts
        for (int64_t i = first_tile; i < last_tile; ++i) memory += lay_out(tiles[i], memory);
        workspace.groups.clear();
        for (int64_t i = 0; i < count; ++i) {
            group(layers[i]);
            if (layers[i].layer->weight && first) cycles += double(layers[i].layer->rows) * double(x.width) * (1 + x.rows / 8.0) / 16;
        }
        all_groups = workspace.groups.data();
        threads = threads_for(cycles);
        scratch = workspace.scratch.reserve(scratch_size * threads);
    }

    // `wide`: x in float32, for the base's product
    void run(const float* wide, int64_t wide_stride) const {
        const int64_t parts_of_x = (x.width + PACK_COLUMNS - 1) / PACK_COLUMNS, tiles = last_tile - first_tile;
        const Tile* tile = workspace.tiles.data() + first_tile;
        if (packed_floats)
            share(threads_for(double(packed_floats)), tiles * parts_of_x, [&](int64_t i, int64_t end, int) {
                for (; i < end; ++i) pack(tile[i / parts_of_x], i % parts_of_x * PACK_COLUMNS);
            });
        if (most_projections)
            share(threads, tiles * most_projections, [&](int64_t i, int64_t end, int thread) {
                for (; i < end; ++i) project(tile[i / most_projections], i % most_projections, thread);
            });
        int64_t units = 0;
        for (int64_t i = 0; i < count; ++i) units += units_of(layers[i]);
        share(threads, units, [&](int64_t begin, int64_t end, int thread) {
            int64_t before = 0;
            for (int64_t i = 0; i < count; before += units_of(layers[i]), ++i) {
                const int64_t from = std::max<int64_t>(begin - before, 0), to = std::min(end - before, units_of(layers[i]));
                if (from < to) rows(layers[i], from * unit, std::min(to * unit, layers[i].rows), wide, wide_stride, thread);
            }
        });
    }

  private:
    int64_t units_of(const Planned& planned) const { return (planned.rows + unit - 1) / unit; }

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
            if (parts[p].kind == Kind::sparse && parts[p].block > unit) unit = PANEL;
        }
        most_projections = std::max(most_projections, lines);
        scratch_size = std::max(scratch_size, aligned(scratch_floats(*tile.delta)));
        if (memory) cycles += tile.delta->cycles * (tile.lanes == 1 ? 1 : tile.lanes * 0.5);
        return taken;
    }

    static void group(Planned& planned) {
        std::vector<Group>& groups = workspace.groups;
        planned.first_group = int64_t(groups.size());
        for (int64_t i = 0; i < planned.tiles; ++i) {
            Tile* tile = workspace.tiles.data() + planned.first_tile + i;
            const bool more = i && groups.back().tiles->delta == tile->delta && groups.back().count < MAX_GROUP;
            if (more) ++groups.back().count;
            else groups.push_back({tile, 1});
        }
        planned.groups = int64_t(groups.size()) - planned.first_group;
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

    // Output rows from .. to of one layer.
    void rows(const Planned& planned, int64_t from, int64_t to, const float* wide, int64_t wide_stride, int thread) const {
        const Layer& layer = *planned.layer;
        const bool base = layer.weight && first;
        const Group* groups = all_groups + planned.first_group;
        for (int64_t strip = from; strip < to; strip += base ? STRIP : to - from) {
            const int64_t end = base ? std::min(strip + STRIP, to) : to, own = std::min(end, layer.rows);
            if (base && strip < own) operations.product(layer, wide, wide_stride, planned.y, strip, own);
            for (int64_t g = 0; g < planned.groups; ++g) {
                const int64_t last = std::min(end, groups[g].tiles->delta->rows);
                for (int64_t row = strip; row < last; row += PANEL)
                    operations.panel(groups[g].tiles, groups[g].count, row, std::min<int64_t>(row + PANEL, last), planned.y,
                                     scratch + thread * scratch_size);
            }
            if (layer.biases && first && strip < own) add_biases(planned, strip, own);
        }
    }

    void add_biases(const Planned& planned, int64_t from, int64_t to) const {
        for (int64_t i = 0; i < segments.count; ++i) {
            const int32_t slot = segments.slots[i];
            if (slot < 0 || !planned.layer->biases[slot]) continue;
            for (int64_t row = segments.offsets[i]; row < segments.offsets[i + 1]; ++row)
                operations.add(planned.y, row, from, to, planned.layer->biases[slot]);
        }
    }

    const Operations& operations;
    const Matrix& x;
    const Segments& segments;
    Planned* layers;
    int64_t count;
    bool first; // of the waves over these layers: the one that computes the base's product and adds biases
    int64_t first_tile = 0, last_tile = 0;
    int64_t packed_floats = 0, most_projections = 0, scratch_size = 0;
    int64_t unit = CHUNK; // output rows that stay together: every block is within one
    double cycles = 0;
    int threads = 1;
    float* scratch = nullptr;
    const Group* all_groups = nullptr; // taken here: the workspace of another thread is another
};

// Checks a layer and cuts its share of the batch into tiles.
Error plan(const Operations& operations, const Layer& layer, const Matrix& x, const Segments& segments, Batch& batch,
           Planned& planned) {
    planned.layer = &layer;
    planned.rows = layer.weight || layer.biases ? layer.rows : 0;
    if (layer.weight && layer.width != x.width) return Error::input_width;
    if (layer.weight && layer.rows > planned.y.width) return Error::output_width;
    if (Error error = batch.plan(segments, {layer.deltas, layer.slots}, x.rows); error != Error::none) return error;
    for (const Batch::Run& run : batch.runs) {
        if (run.delta->width != x.width) return Error::input_width;
        if (run.delta->rows > planned.y.width) return Error::output_width;
        planned.rows = std::max(planned.rows, run.delta->rows);
    }
    planned.first_tile = int64_t(workspace.tiles.size());
    cut(batch, operations.lanes, workspace.tiles);
    planned.tiles = int64_t(workspace.tiles.size()) - planned.first_tile;
    return Error::none;
}

} // namespace

Error linear(const Operations& operations, const Layer* layers, int64_t count, const Matrix& y, const Matrix& x,
             const Segments& segments) {
    Workspace& own = workspace;
    if (x.rows != y.rows) return Error::segments;
    if (int64_t(own.batches.size()) < count) own.batches.resize(count);
    own.layers.assign(count, Planned{});
    own.tiles.clear();
    char* outputs = static_cast<char*>(y.data);
    bool base = false;
    for (int64_t i = 0; i < count; ++i) {
        Planned& planned = own.layers[i];
        planned.y = y;
        if (count > 1) {
            planned.y = {outputs, layers[i].rows, y.rows, layers[i].rows, y.dtype, 0};
            outputs += y.rows * layers[i].rows * value_bytes(y.dtype);
        }
        base = base || layers[i].weight;
        if (Error error = plan(operations, layers[i], x, segments, own.batches[i], planned); error != Error::none) return error;
    }
    const float* wide = static_cast<const float*>(x.data);
    int64_t wide_stride = x.stride;
    if (base && x.dtype != Dtype::float32) {
        float* rows = own.wide.reserve(x.rows * x.width);
        for (int64_t row = 0; row < x.rows; ++row) operations.widen(x, row, rows + row * x.width);
        wide = rows, wide_stride = x.width;
    }
    const int64_t most = std::max<int64_t>(1, WAVE_FLOATS / std::max<int64_t>(1, x.width * MAX_LANES));
    if (int64_t(own.tiles.size()) <= most) {
        Wave(operations, x, segments, own.layers.data(), count, true).run(wide, wide_stride);
        return Error::none;
    }
    for (Planned& planned : own.layers) { // a long prefill: layer after layer, some tiles at a time
        const int64_t last = planned.first_tile + planned.tiles;
        bool first = true;
        do {
            planned.tiles = std::min(most, last - planned.first_tile);
            Wave(operations, x, segments, &planned, 1, first).run(wide, wide_stride);
            planned.first_tile += planned.tiles;
            first = false;
        } while (planned.first_tile < last);
    }
    return Error::none;
}

} // namespace deltaserve
