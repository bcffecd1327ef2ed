// Columns of sparse parts: the draws of delta_store/codec/masks.py, number for number (what they mean stands there), and how
// the kernels keep them.
#pragma once

#include <cstdint>

namespace deltaserve {

// columns [blocks, kept]: one of each of `kept` strata of [0, width)
void uniform_columns(uint32_t key, uint32_t second_key, int64_t blocks, int64_t width, int64_t kept, int32_t* columns);

// columns [blocks, kept] in proportion to weights [width], each at least 1, whose total times `kept` stays below 2^62;
// factors [width]. False, and nothing written, for other weights.
bool weighted_columns(const int64_t* weights, uint32_t key, uint32_t second_key, int64_t blocks, int64_t width, int64_t kept,
                      int32_t* columns, float* factors);

// Copies columns [blocks, kept] into as many T. False if a row does not ascend or one is outside of [0, width).
template <class T> bool keep_columns(const int32_t* columns, int64_t blocks, int64_t width, int64_t kept, T* to) {
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t k = 0, last = -1; k < kept; ++k, ++columns, ++to) {
            if (*columns <= last || *columns >= width) return false;
            last = *columns;
            *to = T(*columns);
        }
    return true;
}

} // namespace deltaserve
