// What a query reads from a paged cache. Mirrored field by field in attention.py.
#pragma once

#include "delta.h"

namespace deltaserve {

constexpr int64_t KEYS = 128; // of one request, whose weights are computed at a time; pages are cut at multiples of it

// Of one layer: token rows of [key_heads, head_width], float32 or bf16. `heads` / `key_heads` queries share a key.
struct Attention {
    const void* keys;
    const void* values;
    int64_t cache_rows;
    int64_t heads, key_heads, head_width;
    float scale;
    Codec codec;
};

// For each row of the batch: its keys are the first `lengths[row]` tokens of the pages starts[first[row]], ..
struct Pages {
    const int64_t* starts; // [count], the token row at which each page begins
    int64_t count;
    const int64_t* first;   // [rows]
    const int64_t* lengths; // [rows], at least 1
    int64_t tokens;         // a page
};

// Some keys' share of one row's result: `largest` score and `sum` of the weights relative to it by head [heads], then the
// weighted values [heads, head_width].
struct Partial {
    float *largest, *sum, *values;
};

} // namespace deltaserve
