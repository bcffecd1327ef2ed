// See linear.h. The work is cut by output rows: a thread has a range of them, computes the base's product for some of them and
// some rows of the batch, then adds what each variant's tiles get, while inputs and outputs are in the nearest caches.
#include "linear.h"
#include "workspace.h"

#include <vector>

namespace deltaserve {
namespace {

constexpr int64_t WAVE_FLOATS = 1 << 21; // packed inputs at a time, so that a long prefill needs no more memory
constexpr int64_t PACK_COLUMNS = 512;
constexpr int64_t STRIP_BYTES = 512 << 10; // of the base's weight before the deltas of its rows: the cache still has all else

constexpr int64_t PRIVATE_FLOATS = 1 << 20;   // up to so many each thread packs for itself: another core's are far away
constexpr double PRIVATE_PRODUCTS = 1 << 18;   // and up to so many products each thread projects for itself

// Consecutive tiles of one variant that are added together, counted from the wave's first; after which pass over the batch.
struct Group {
    int64_t first, count, pass;
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
    std::vector<Tile> tiles, private_tiles;
    std::vector<Group> groups;
    Floats wide, inputs, scratch;
};
thread_local Workspace workspace;

bool has_factors(const Part& part) { return part.kind == Kind::sparse && part.factors; }

int64_t projections(const Part& part) {
    return part.kind == Kind::low_rank ? part.kept : part.kind == Kind::rows && part.mean ? 1 : 0;
}

void fetch(const void* data, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(data) + at, 0, 2);
}

// Asks for the sparse values of output rows from .. to: they are few and far apart, so that the hardware guesses none.
void fetch_rows(const Delta& delta, int64_t from, int64_t to) {
    for (int64_t p = 0; p < delta.count; ++p) {
        const Part& part = delta.parts[p];
        if (part.kind != Kind::sparse) continue;
        const int64_t first = from / part.block, blocks = (to - 1) / part.block + 1 - first;
        const int64_t column_bytes = part.kept * (part.wide_columns ? 4 : 2);
        fetch(part.a.data + first * part.a.line_bytes, blocks * part.a.line_bytes);
        fetch(static_cast<const char*>(part.columns) + first * column_bytes, blocks * column_bytes);
        if (part.a.scales) fetch(part.a.scales + first * part.a.length / part.a.group, 2 * blocks * part.a.length / part.a.group);
    }
}

int64_t value_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Some of the planned layers with some of their tiles.
class Wave {
  public:
    // `wide`: x in float32
    Wave(const Operations& operations, const Matrix& x, const Matrix& wide, const Segments& segments, Planned* layers, int64_t count, bool first)
        : operations(operations), x(x), wide(wide), segments(segments), layers(layers), count(count),
          pass_rows(operations.pass_rows(x.width)), first(first) {
        const int64_t first_tile = layers[0].first_tile;
        tile_count = layers[count - 1].first_tile + layers[count - 1].tiles - first_tile;
        tiles = workspace.tiles.data() + first_tile;
        int64_t floats = 0;
        for (int64_t i = 0; i < tile_count; ++i) {
            floats += lay_out(tiles[i], nullptr);
            count_work(tiles[i]);
        }
        workspace.groups.clear();
        for (int64_t i = 0; i < count; ++i) {
            group(layers[i], first_tile);
            if (layers[i].layer->weight && first) cycles += double(layers[i].layer->rows) * double(x.width) * (1 + x.rows / 8.0) / 16;
        }
        groups = workspace.groups.data();
        threads = threads_for(cycles);
        scratch = workspace.scratch.reserve(scratch_size * threads);
        is_private = threads > 1 && packed_floats <= PRIVATE_FLOATS && double(packed_floats) / 4 <= cycles / threads &&
                     products <= PRIVATE_PRODUCTS;
        if (is_private) copy_tiles();
        const int copies = is_private ? threads : 1;
        float* memory = workspace.inputs.reserve(floats * copies + 1); // never nullptr, which only counts
        for (int64_t i = 0; i < tile_count * copies; ++i) memory += lay_out(tiles[i], memory);
    }

    void run() const {
        if (!is_private) prepare_together();
        int64_t units = 0;
        for (int64_t i = 0; i < count; ++i) units += units_of(layers[i]);
        share(threads, units, [&](int64_t begin, int64_t end, int thread) {
            const Tile* own = tiles + (is_private ? thread * tile_count : 0);
            if (is_private) prepare_alone(own, thread);
            int64_t before = 0;
            for (int64_t i = 0; i < count; before += units_of(layers[i]), ++i) {
                const int64_t from = std::max<int64_t>(begin - before, 0), to = std::min(end - before, units_of(layers[i]));
                if (from < to) rows(layers[i], own, from * unit, std::min(to * unit, layers[i].rows), thread);
            }
        });
    }

  private:
    int64_t units_of(const Planned& planned) const { return (planned.rows + unit - 1) / unit; }

    void copy_tiles() {
        std::vector<Tile>& copies = workspace.private_tiles;
        copies.clear();
        for (int i = 0; i < threads; ++i) copies.insert(copies.end(), tiles, tiles + tile_count);
        tiles = copies.data();
    }

    void prepare_together() const {
        const int64_t parts_of_x = (x.width + PACK_COLUMNS - 1) / PACK_COLUMNS;
        if (packed_floats)
            share(threads_for(double(packed_floats)), tile_count * parts_of_x, [&](int64_t i, int64_t end, int) {
                for (; i < end; ++i) pack(tiles[i / parts_of_x], i % parts_of_x * PACK_COLUMNS);
            });
        if (most_projections)
            share(std::min(threads, threads_for(products / CHUNK)), tile_count * most_projections, [&](int64_t i, int64_t end, int thread) {
                for (; i < end; ++i) project(tiles[i / most_projections], i % most_projections, thread);
            });
    }

    void prepare_alone(const Tile* own, int thread) const {
        for (int64_t i = 0; i < tile_count; ++i) {
            for (int64_t from = 0; packed_floats && from < x.width; from += PACK_COLUMNS) pack(own[i], from);
            for (int64_t line = 0; line < most_projections; ++line) project(own[i], line, thread);
        }
    }

    // Points a tile at its share of `memory` (or only counts, for nullptr); returns the floats that it takes.
    int64_t lay_out(Tile& tile, float* memory) const {
        int64_t taken = 0;
        auto take = [&](int64_t floats) {
            float* at = memory ? memory + taken : nullptr;
            taken += aligned(floats);
            return at;
        };
        const Part* parts = tile.delta->parts;
        float* packed = packs_x(tile) ? take(tile.lanes * x.width) : nullptr;
        tile.x = packed ? packed : static_cast<float*>(wide.data);
        tile.stride = wide.stride;
        for (int64_t p = 0; p < tile.delta->count; ++p)
            if (packs_products(tile, p)) tile.inputs[p] = take(tile.lanes * x.width);
            else if (projections(parts[p])) tile.inputs[p] = take(projections(parts[p]) * std::max(tile.lanes, tile.count));
            else tile.inputs[p] = packed;
        return taken;
    }

    static bool packs_products(const Tile& tile, int64_t p) { return tile.lanes > 1 && has_factors(tile.delta->parts[p]); }

    static bool packs_x(const Tile& tile) {
        return tile.lanes > 1 && !std::all_of(tile.delta->parts, tile.delta->parts + tile.delta->count, has_factors);
    }

    void count_work(const Tile& tile) {
        int64_t lines = 0;
        packed_floats += packs_x(tile) ? tile.lanes * x.width : 0;
        for (int64_t p = 0; p < tile.delta->count; ++p) {
            const Part& part = tile.delta->parts[p];
            lines += projections(part);
            packed_floats += packs_products(tile, p) ? tile.lanes * x.width : 0;
            if (part.kind == Kind::sparse && part.block > unit) unit = PANEL;
        }
        most_projections = std::max(most_projections, lines);
        products += double(lines) * double(std::max(tile.lanes, tile.count)) * double(x.width);
        scratch_size = std::max(scratch_size, aligned(scratch_floats(*tile.delta)));
        cycles += tile.delta->cycles * (tile.lanes == 1 ? (1 + tile.count) * 0.5 : tile.lanes * 0.5);
    }

    void group(Planned& planned, int64_t first_tile) const {
        std::vector<Group>& all = workspace.groups;
        planned.first_group = int64_t(all.size());
        for (int64_t i = 0; i < planned.tiles; ++i) {
            const int64_t tile = planned.first_tile - first_tile + i;
            const bool more = i && tiles[tile].lanes > 1 && tiles[tile].delta == tiles[tile - 1].delta && tiles[tile - 1].lanes > 1 &&
                              all.back().count < MAX_GROUP;
            const int64_t pass = tiles[tile].rows[tiles[tile].count - 1] / pass_rows; // of its last row
            if (more) ++all.back().count, all.back().pass = pass;
            else all.push_back({tile, 1, pass});
        }
        planned.groups = int64_t(all.size()) - planned.first_group;
        std::stable_sort(all.begin() + planned.first_group, all.end(), [](const Group& a, const Group& b) { return a.pass < b.pass; });
    }

    void pack(const Tile& tile, int64_t from) const {
        const int64_t end = std::min(from + PACK_COLUMNS, x.width);
        if (packs_x(tile)) operations.pack(tile, x, nullptr, from, end, tile.x);
        for (int64_t p = 0; p < tile.delta->count; ++p)
            if (packs_products(tile, p))
                operations.pack(tile, x, tile.delta->parts[p].factors, from, end, tile.inputs[p]);
    }

    void project(const Tile& tile, int64_t line, int thread) const {
        for (int64_t p = 0; p < tile.delta->count; ++p) {
            const int64_t own = projections(tile.delta->parts[p]);
            if (line < own) return operations.project(tile, p, line, own, scratch + thread * scratch_size);
            line -= own;
        }
    }

    // Output rows from .. to of one layer.
    void rows(const Planned& planned, const Tile* own_tiles, int64_t from, int64_t to, int thread) const {
        const Layer& layer = *planned.layer;
        const bool base = layer.weight && first;
        const Group *begin = groups + planned.first_group, *end = begin + planned.groups;
        const int64_t fit = STRIP_BYTES / int64_t(sizeof(float)) / x.width / unit * unit;
        for (int64_t strip = from, next; strip < to; strip = next) {
            next = base ? std::min(strip + std::max(fit, unit), to) : to;
            for (const Group* group = begin; group != end; ++group) {
                const Delta& delta = *own_tiles[group->first].delta;
                if (strip < delta.rows) fetch_rows(delta, strip, std::min(next, delta.rows));
            }
            const int64_t own = std::min(next, layer.rows);
            const Group* group = begin;
            for (int64_t row = 0, pass = 0; row < x.rows; row += pass_rows, ++pass) {
                if (base && strip < own) product_of_pass(planned, row, strip, own);
                for (; group != end && group->pass == pass; ++group)
                    add_group(planned, own_tiles + group->first, group->count, strip, next, scratch + thread * scratch_size);
            }
            if (layer.biases && first && strip < own) add_biases(planned, strip, own);
        }
    }

    void product_of_pass(const Planned& planned, int64_t row, int64_t from, int64_t to) const {
        Matrix y = planned.y;
        y.data = static_cast<char*>(y.data) + row * y.stride * value_bytes(y.dtype);
        y.rows = std::min(pass_rows, x.rows - row);
        operations.product(*planned.layer, static_cast<const float*>(wide.data) + row * wide.stride, wide.stride, y, from, to);
    }

    void add_group(const Planned& planned, const Tile* tiles, int64_t count, int64_t from, int64_t to, float* own_scratch) const {
        to = std::min(to, tiles->delta->rows);
        if (tiles->lanes == 1) operations.add_by_rows(*tiles, from, to, planned.y, own_scratch);
        else operations.add_by_lanes(tiles, count, from, to, planned.y, own_scratch);
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
    const Matrix &x, &wide;
    const Segments& segments;
    Planned* layers;
    int64_t count;
    int64_t pass_rows;
    bool first; // of the waves over these layers: the one that computes the base's product and adds biases
    // taken from the workspace here, because a worker's workspace is another
    Tile* tiles = nullptr;
    const Group* groups = nullptr;
    float* scratch = nullptr;
    int64_t tile_count = 0, packed_floats = 0, most_projections = 0, scratch_size = 0;
    double products = 0, cycles = 0;
    int64_t unit = CHUNK; // output rows that stay together: every block is within one
    int threads = 1;
    bool is_private = false; // each thread has its own copy of the tiles and of what they point to
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
    cut(batch, operations.lanes, operations.pass_rows(x.width), workspace.tiles);
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
    Matrix wide = x;
    if ((base || !own.tiles.empty()) && x.dtype != Dtype::float32) {
        float* rows = own.wide.reserve(x.rows * x.width);
        for (int64_t row = 0; row < x.rows; ++row) operations.widen(x, row, rows + row * x.width);
        wide = {rows, x.width, x.rows, x.width, Dtype::float32, 0};
    }
    const int64_t most = std::max<int64_t>(1, WAVE_FLOATS / std::max<int64_t>(1, x.width * MAX_LANES));
    if (int64_t(own.tiles.size()) <= most) {
        Wave(operations, x, wide, segments, own.layers.data(), count, true).run();
        return Error::none;
    }
    for (Planned& planned : own.layers) { // a long prefill: layer after layer, some tiles at a time
        const int64_t last = planned.first_tile + planned.tiles;
        bool first = true;
        do {
            planned.tiles = std::min(most, last - planned.first_tile);
            Wave(operations, x, wide, segments, &planned, 1, first).run();
            planned.first_tile += planned.tiles;
            first = false;
        } while (planned.first_tile < last);
    }
    return Error::none;
}

} // namespace deltaserve
