// The decoder blocks of a model, one after the other, for the few rows of a decoding step: one call, so that nothing but the
// work itself is paid for. Structs are mirrored field by field in decoder.py.
#pragma once

#include "attention.h"
#include "batch.h"

namespace deltaserve {

// y = (weight + offset) * x / root(mean(x * x) + epsilon). `table` [entries, width]: the base's vector and each slot's.
struct Norm {
    const float* weight;
    const float* table;
    int64_t entries;
    float epsilon, offset;
};

// x += output(attention(input(norm(x)))); x += down(silu(gate) * up of norm(x))
struct Block {
    Norm attention_norm, mlp_norm;
    const Layer* input;       // query, key, value
    const Layer* output;
    const Layer* gate_and_up;
    const Layer* down;
};

// What the blocks share; `attention` without the addresses of keys and values, which `keys` and `values` [blocks] have.
struct Step {
    Attention attention;
    void* const* keys;
    void* const* values;
    Pages pages;
    const int64_t* writes; // [rows], where in the cache each row's own key and value go
    const float* cosines;  // [rows, head_width]
    const float* sines;
    const int64_t* places; // [rows], each row's entry in the norms' tables; nullptr: the weight is that of all rows
    Segments segments;
};

// Everything that could be read or written outside of the cache. Then `attend` cannot fail but for memory.
Error check(const Attention& attention, const Pages& pages, int64_t rows);

// out [rows, heads * head_width] of queries of the same shape; throws std::bad_alloc
void attend(const Operations& operations, const Attention& attention, const Pages& pages, const float* queries, float* out, int64_t rows);

// x [rows, width] in place; a cache of float32
Error decode(const Operations& operations, const Block* blocks, int64_t count, const Step& step, float* x, int64_t rows);

} // namespace deltaserve
