// The base's own product for the few rows of a serving batch: y = x @ weight.T. A weight is read once, in the order in which
// it lies in memory, and meets all rows of the batch while it is in the nearest cache; the memory's speed is the limit up to
// about eight rows. Every output is one sum in one fixed order, whatever the batch: a row's result does not depend on the
// rows beside it.
#pragma once

#include "delta.h"

namespace deltaserve {
namespace {

constexpr int64_t AHEAD = 32768;       // bytes that are asked for before they are needed; the best of 1 KB to 64 KB on Zen 4
constexpr int64_t X_BYTES = 256 << 10; // rows of x that share a pass over some rows of the weight: their part of the L2 cache

// Rows of the weight (R) and of the batch (T) whose sums the registers hold: for fewer than 4 rows of the batch, up to 24, more.
#if DELTASERVE_ROWS == 16
constexpr int FEW_R = 8, FEW_T = 3, SOME_R = 4, SOME_T = 4, MANY_R = 8, MANY_T = 3;
#elif DELTASERVE_ROWS == 8
constexpr int FEW_R = 4, FEW_T = 1, SOME_R = 2, SOME_T = 3, MANY_R = 2, MANY_T = 3;
#else
constexpr int FEW_R = 2, FEW_T = 1, SOME_R = 1, SOME_T = 2, MANY_R = 1, MANY_T = 2;
#endif

template <Codec C> constexpr int64_t value_bytes = chunk_bytes<C> / CHUNK;

// Asks for the R chunks that lie AHEAD, in order: neither the hardware's guess nor the order of the reads (R rows at a time)
// is sequential. Only one of the chunks that share a cache line asks.
template <Codec C, int R> inline void prefetch(const uint8_t*& ahead) {
    constexpr int sharing = 64 / chunk_bytes<C>;
    for (int r = 0; r < R; r += sharing) __builtin_prefetch(ahead + r * chunk_bytes<C>, 0, 2);
    ahead += R * chunk_bytes<C>;
}

// sums[T][R] = T rows of x @ R rows of the weight
template <Codec C, int R, int T>
inline void product_tile(const uint8_t* weight, int64_t width, const float* x, int64_t stride, bool first, float (&sums)[T][R]) {
    const int64_t row_bytes = width * value_bytes<C>;
    const uint8_t* ahead = weight + AHEAD;
    F16 total[T][R];
    for (auto& row : total)
        for (F16& sum : row) sum = zero<F16>();
    auto step = [&](const F16 (&values)[R], const float* inputs, int t) {
        const F16 input = load<F16>(inputs);
        for (int r = 0; r < R; ++r) total[t][r] = fused(values[r], input, total[t][r]);
    };
    int64_t k = 0;
    for (; k + CHUNK <= width; k += CHUNK, weight += chunk_bytes<C>) {
        if (first) prefetch<C, R>(ahead);
        F16 values[R];
        for (int r = 0; r < R; ++r) values[r] = decode<C>(weight + r * row_bytes);
        for (int t = 0; t < T; ++t) step(values, x + t * stride + k, t);
    }
    if (k < width) { // the last chunk of a row, filled up with zeros
        F16 values[R];
        for (int r = 0; r < R; ++r) {
            uint8_t bytes[chunk_bytes<C>] = {};
            memcpy(bytes, weight + r * row_bytes, (width - k) * value_bytes<C>);
            values[r] = decode<C>(bytes);
        }
        for (int t = 0; t < T; ++t) {
            float inputs[CHUNK] = {};
            memcpy(inputs, x + t * stride + k, (width - k) * sizeof(float));
            step(values, inputs, t);
        }
    }
    for (int t = 0; t < T; ++t) sum_lanes<R>(total[t], sums[t]);
}

// y[T rows from `t`, R columns from `row`] = their product with the bias, scaled, rounded once
template <Codec C, int R, int T>
void product_rows(const Layer& layer, int64_t row, const float* x, int64_t stride, const Matrix& y, int64_t t, bool first) {
    float sums[T][R];
    const uint8_t* weight = static_cast<const uint8_t*>(layer.weight) + row * layer.width * value_bytes<C>;
    product_tile<C, R, T>(weight, layer.width, x + t * stride, stride, first, sums);
    with_dtype(y.dtype, [&](auto* type) {
        for (int i = 0; i < T; ++i) {
            auto* outputs = row_of<std::remove_pointer_t<decltype(type)>>(y, t + i) + row;
            for (int r = 0; r < R; ++r) {
                float sum = sums[i][r];
                if (layer.bias) sum += layer.bias[row + r];
                if (C == Codec::int8) sum *= layer.scales[row + r]; // last: fused or not, the result is the same
                outputs[r] = rounded<std::remove_pointer_t<decltype(type)>>(sum);
            }
        }
    });
}

// Rows t .. end of the batch, T at a time and what is left over fewer at a time; the first pass over the weight fetches it.
template <Codec C, int R, int T>
void product_strip(const Layer& layer, int64_t row, const float* x, int64_t stride, const Matrix& y, int64_t t, int64_t end, bool first) {
    for (; t + T <= end; t += T, first = false) product_rows<C, R, T>(layer, row, x, stride, y, t, first);
    if constexpr (T > 1)
        if (t < end) product_strip<C, R, T - 1>(layer, row, x, stride, y, t, end, first);
}

template <Codec C, int R, int T>
void product_with(const Layer& layer, const float* x, int64_t stride, const Matrix& y, int64_t from, int64_t to) {
    const int64_t fit = X_BYTES / int64_t(sizeof(float)) / layer.width / T * T, together = fit > T ? fit : T;
    for (int64_t t = 0; t < y.rows; t += together) {
        const int64_t end = t + together < y.rows ? t + together : y.rows;
        int64_t row = from;
        for (; row + R <= to; row += R) product_strip<C, R, T>(layer, row, x, stride, y, t, end, t == 0);
        for (; row < to; ++row) product_strip<C, 1, T>(layer, row, x, stride, y, t, end, false);
    }
}

template <Codec C> void product_of(const Layer& layer, const float* x, int64_t stride, const Matrix& y, int64_t from, int64_t to) {
    if (y.rows < 4) product_with<C, FEW_R, FEW_T>(layer, x, stride, y, from, to);
    else if (y.rows <= 24) product_with<C, SOME_R, SOME_T>(layer, x, stride, y, from, to);
    else product_with<C, MANY_R, MANY_T>(layer, x, stride, y, from, to);
}

inline void product(const Layer& layer, const float* x, int64_t stride, const Matrix& y, int64_t from, int64_t to) {
    switch (layer.codec) {
        case Codec::float32: return product_of<Codec::float32>(layer, x, stride, y, from, to);
        case Codec::bf16: return product_of<Codec::bf16>(layer, x, stride, y, from, to);
        default: return product_of<Codec::int8>(layer, x, stride, y, from, to);
    }
}

} // namespace
} // namespace deltaserve
