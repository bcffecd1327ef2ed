// See decoder.h.
#include "decoder.h"
#include "linear.h"
#include "workspace.h"

#include <cstring>

namespace deltaserve {
namespace {

thread_local Floats workspace;

Matrix matrix(float* data, int64_t rows, int64_t width) { return {data, width, rows, width, Dtype::float32, 0}; }

struct Decoding {
    const Operations& operations;
    const Step& step;
    int64_t rows, width;
    float *normed, *projected, *attended, *added; // projected: the outputs of several layers, one after the other

    template <class Body> void each_row(double cycles_a_row, const Body& body) const {
        share(threads_for(cycles_a_row * double(rows)), rows, [&](int64_t row, int64_t end, int) {
            for (; row < end; ++row) body(row);
        });
    }

    Error layers(const Layer* of, int64_t count, float* x, float* y) const {
        return linear(operations, of, count, matrix(y, rows, of->rows), matrix(x, rows, of->width), step.segments);
    }

    void norm(const Norm& norm, const float* x) const {
        each_row(double(width) / 4, [&](int64_t row) {
            const float* weight = step.places ? norm.table + step.places[row] * width : norm.weight;
            operations.rms_norm(x + row * width, weight, width, norm.epsilon, norm.offset, normed + row * width);
        });
    }

    void add(float* x) const {
        const Matrix to = matrix(x, rows, width);
        each_row(double(width) / 8, [&](int64_t row) { operations.add(to, row, 0, width, added + row * width); });
    }

    // Rotary embedding of queries and keys; keys and values into the cache, where the row's own attention finds them, too.
    void store(const Attention& attention) const {
        const int64_t query_width = attention.heads * attention.head_width, key_width = attention.key_heads * attention.head_width;
        each_row(double(query_width) / 2, [&](int64_t row) {
            const float *cosines = step.cosines + row * attention.head_width, *sines = step.sines + row * attention.head_width;
            float* query = projected + row * query_width;
            const float* key = projected + rows * query_width + row * key_width;
            const int64_t at = step.writes[row] * key_width;
            float* stored = static_cast<float*>(const_cast<void*>(attention.keys)) + at;
            std::memcpy(stored, key, key_width * sizeof(float));
            operations.rotate(cosines, sines, attention.heads, attention.head_width, query);
            operations.rotate(cosines, sines, attention.key_heads, attention.head_width, stored);
            std::memcpy(static_cast<float*>(const_cast<void*>(attention.values)) + at, key + rows * key_width, key_width * sizeof(float));
        });
    }

    Error block(const Block& block, int64_t index, float* x) const {
        Attention attention = step.attention;
        attention.keys = step.keys[index];
        attention.values = step.values[index];
        norm(block.attention_norm, x);
        if (Error error = layers(block.input, 3, normed, projected); error != Error::none) return error;
        store(attention);
        attend(operations, attention, step.pages, projected, attended, rows);
        if (Error error = layers(block.output, 1, attended, added); error != Error::none) return error;
        add(x);
        norm(block.mlp_norm, x);
        if (Error error = layers(block.gate_and_up, 2, normed, projected); error != Error::none) return error;
        const int64_t inner = block.down->width;
        each_row(double(inner) * 2, [&](int64_t row) {
            operations.gate_by_silu(projected + (rows + row) * inner, inner, projected + row * inner);
        });
        if (Error error = layers(block.down, 1, projected, added); error != Error::none) return error;
        add(x);
        return Error::none;
    }
};

bool fits(const Attention& attention, const Block& block, int64_t width) {
    const int64_t queries = attention.heads * attention.head_width, keys = attention.key_heads * attention.head_width;
    const Layer *in = block.input, *inner = block.gate_and_up;
    return in[0].rows == queries && in[1].rows == keys && in[2].rows == keys && block.output->width == queries &&
           block.output->rows == width && inner[0].rows == inner[1].rows && block.down->width == inner[0].rows &&
           block.down->rows == width && in->width == width && inner->width == width;
}

} // namespace

Error decode(const Operations& operations, const Block* blocks, int64_t count, const Step& step, float* x, int64_t rows) {
    const Attention& attention = step.attention;
    if (Error error = check(attention, step.pages, rows); error != Error::none) return error;
    const int64_t width = blocks->input->width, queries = attention.heads * attention.head_width;
    int64_t widest = queries + 2 * attention.key_heads * attention.head_width;
    for (int64_t i = 0; i < count; ++i) {
        if (attention.codec != Codec::float32 || attention.head_width % 2 || !fits(attention, blocks[i], width)) return Error::shape;
        widest = std::max(widest, 2 * blocks[i].down->width);
    }
    for (int64_t row = 0; row < rows; ++row) {
        if (step.writes[row] < 0 || step.writes[row] >= attention.cache_rows) return Error::page;
        for (int64_t i = 0; step.places && i < count; ++i)
            for (const Norm* norm : {&blocks[i].attention_norm, &blocks[i].mlp_norm})
                if (step.places[row] < 0 || step.places[row] >= norm->entries) return Error::slot;
    }
    const int64_t hidden = aligned(rows * width);
    float* memory = workspace.reserve(2 * hidden + aligned(rows * queries) + rows * widest);
    const Decoding decoding{operations, step,           rows, width, memory, memory + 2 * hidden + aligned(rows * queries),
                            memory + 2 * hidden, memory + hidden};
    for (int64_t i = 0; i < count; ++i)
        if (Error error = decoding.block(blocks[i], i, x); error != Error::none) return error;
    return Error::none;
}

} // namespace deltaserve
