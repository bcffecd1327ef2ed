// The base's own product for the few rows of a serving batch: y = x @ weight.T. A weight is read once, in the order in which
// it lies in memory, and meets all rows of the batch while it is in the nearest cache; the memory's speed is the limit up to
// about eight rows. Every output is one sum in one fixed order, whatever the batch: a row's result does not depend on the
// rows beside it.
#pragma once

#include "delta.h"

namespace deltaserve {
namespace {

constexpr int64_t AHEAD = 32768; // bytes that few rows ask for before they need them; the best of 8 KB to 128 KB on Zen 4
constexpr int64_t DEEP = 576;    // columns that more rows share at a time: twice R rows of them fit into the nearest cache
constexpr int64_t PASS_ROWS = 64; // rows of x that share a pass over some rows of the weight, at most: their part of the L2 cache

// Rows of the weight (R) and of the batch (T) whose sums the registers hold, for fewer than 4 rows of the batch and for more.
// Many: the lanes that a tile of the latter computes at a time; with half of them more rows share what is read. PASS_FLOATS of
// x share a pass where the L2 cache holds no more.
#if DELTASERVE_ROWS == 16
constexpr int FEW_R = 8, FEW_T = 3, MANY_R = 6, MANY_T = 4;
constexpr int64_t PASS_FLOATS = 1 << 30;
using Many = F16;
#elif DELTASERVE_ROWS == 8
constexpr int FEW_R = 4, FEW_T = 1, MANY_R = 4, MANY_T = 3;
constexpr int64_t PASS_FLOATS = 40 << 10;
using Many = F8;
#else
constexpr int FEW_R = 2, FEW_T = 1, MANY_R = 1, MANY_T = 2;
constexpr int64_t PASS_FLOATS = 1 << 30;
using Many = F16;
#endif

template <class F, Codec C> inline F weights(const uint8_t* p) {
#if DELTASERVE_ROWS == 8
    if constexpr (F::lanes == 8) return decode_half<C>(p);
    else
#endif
        return decode<C>(p);
}

template <Codec C> constexpr int64_t value_bytes = chunk_bytes<C> / CHUNK;

// What a tile asks the memory for at each chunk: `count` cache lines, `stride` bytes apart, and `step` bytes further at the next.
// Into the L2 cache, which has more requests under way: up to 2.2 times as fast on Zen 4 as into the nearest.
struct Ahead {
    const uint8_t* at = nullptr;
    int64_t count = 0, stride = 0, step = 0;
};

// One chunk: total[T][R] += T rows of x @ R rows of the weight, each lane by itself.
template <class F, Codec C, int R, int T>
inline void product_chunk(const uint8_t* weight, int64_t row_bytes, const float* x, int64_t stride, F (&total)[T][R]) {
    F inputs[T];
    UNROLLED for (int t = 0; t < T; ++t) inputs[t] = load<F>(x + t * stride);
    UNROLLED for (int r = 0; r < R; ++r) {
        const F value = weights<F, C>(weight + r * row_bytes);
        UNROLLED for (int t = 0; t < T; ++t) total[t][r] = fused(value, inputs[t], total[t][r]);
    }
}

// total[T][R] += the whole chunks among some columns; returns how many columns those are. Most tiles ask the memory for
// nothing, and then two chunks a turn hide the loop's own work.
template <class F, Codec C, int R, int T>
inline int64_t product_chunks(const uint8_t* weight, int64_t row_bytes, int64_t columns, const float* x, int64_t stride, Ahead ahead,
                              F (&total)[T][R]) {
    int64_t k = 0;
    for (; ahead.count && k + CHUNK <= columns; k += CHUNK, weight += chunk_bytes<C>, x += CHUNK, ahead.at += ahead.step) {
        for (int64_t i = 0; i < ahead.count; ++i) __builtin_prefetch(ahead.at + i * ahead.stride, 0, 2);
        product_chunk<F, C, R, T>(weight, row_bytes, x, stride, total);
    }
    for (; k + 2 * CHUNK <= columns; k += 2 * CHUNK, weight += 2 * chunk_bytes<C>, x += 2 * CHUNK) {
        product_chunk<F, C, R, T>(weight, row_bytes, x, stride, total);
        product_chunk<F, C, R, T>(weight + chunk_bytes<C>, row_bytes, x + CHUNK, stride, total);
    }
    if (k + CHUNK <= columns) {
        product_chunk<F, C, R, T>(weight, row_bytes, x, stride, total);
        k += CHUNK;
    }
    return k;
}

// The same for the `count` columns of a last chunk that is not whole.
template <class F, Codec C, int R, int T>
inline void product_rest(const uint8_t* weight, int64_t row_bytes, int64_t count, const float* x, int64_t stride, F (&total)[T][R]) {
    float inputs[T][F::lanes] = {};
    uint8_t bytes[R][F::lanes * value_bytes<C>] = {};
    for (int t = 0; t < T; ++t) memcpy(inputs[t], x + t * stride, count * sizeof(float));
    for (int r = 0; r < R; ++r) memcpy(bytes[r], weight + r * row_bytes, count * value_bytes<C>);
    product_chunk<F, C, R, T>(bytes[0], sizeof bytes[0], inputs[0], F::lanes, total);
}

// totals[T][R] = T rows of x @ R rows of the weight over some columns, lane by lane; `begun`: added to what is there.
// F::lanes of the 16 lanes at a time. Never inlined: within a caller GCC does not always keep the totals in registers,
// and then a tile takes twice as long.
template <class F, Codec C, int R, int T>
__attribute__((noinline)) void product_tile(const uint8_t* weight, int64_t row_bytes, int64_t columns, const float* x, int64_t stride,
                                            Ahead ahead, bool begun, float (&totals)[T][R][CHUNK]) {
    float* at = totals[0][0];
    for (int64_t lane = 0; lane < CHUNK; lane += F::lanes, at += F::lanes, weight += F::lanes * value_bytes<C>, x += F::lanes, ahead = {}) {
        F total[T][R];
        UNROLLED for (int t = 0; t < T; ++t)
            UNROLLED for (int r = 0; r < R; ++r) total[t][r] = begun ? load<F>(at + (t * R + r) * CHUNK) : zero<F>();
        const int64_t k = product_chunks<F, C, R, T>(weight, row_bytes, columns, x, stride, ahead, total), left = columns - k - lane;
        if (left > 0)
            product_rest<F, C, R, T>(weight + k * value_bytes<C>, row_bytes, left < F::lanes ? left : F::lanes, x + k, stride, total);
        UNROLLED for (int t = 0; t < T; ++t)
            UNROLLED for (int r = 0; r < R; ++r) store(at + (t * R + r) * CHUNK, total[t][r]);
    }
}

// y[T rows from `t`, R columns from `row`] = the sums of the lanes with the bias, scaled, rounded once
template <Codec C, int R, int T>
void product_outputs(const Layer& layer, int64_t row, const float (&totals)[T][R][CHUNK], const Matrix& y, int64_t t) {
    float sums[T][R];
    UNROLLED for (int i = 0; i < T; ++i) {
        F16 lanes[R];
        UNROLLED for (int r = 0; r < R; ++r) lanes[r] = load<F16>(totals[i][r]);
        sum_lanes<R>(lanes, sums[i]);
    }
    if (C != Codec::int8 && !layer.bias && y.dtype == Dtype::float32) {
        UNROLLED for (int i = 0; i < T; ++i) memcpy(row_of<float>(y, t + i) + row, sums[i], sizeof sums[i]);
        return;
    }
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

// A tile's rows of the batch: as fast as memory, if it is read in the order in which the weight lies there.
template <Codec C, int R, int T>
void product_of_few(const Layer& layer, const float* x, int64_t stride, const Matrix& y, int64_t from, int64_t to, int64_t t) {
    if constexpr (T > 1)
        if (y.rows - t < T) return product_of_few<C, R, T - 1>(layer, x, stride, y, from, to, t);
    constexpr int64_t line = chunk_bytes<C> < 64 ? 64 : chunk_bytes<C>;
    const int64_t row_bytes = layer.width * value_bytes<C>;
    const uint8_t* weight = static_cast<const uint8_t*>(layer.weight) + from * row_bytes;
    float totals[T][R][CHUNK], single[T][1][CHUNK];
    for (; from + R <= to; from += R, weight += R * row_bytes) {
        const Ahead ahead{weight + AHEAD, R * chunk_bytes<C> / line, line, R * chunk_bytes<C>};
        product_tile<F16, C, R, T>(weight, row_bytes, layer.width, x + t * stride, stride, ahead, false, totals);
        product_outputs<C, R, T>(layer, from, totals, y, t);
    }
    for (; from < to; ++from, weight += row_bytes) {
        product_tile<F16, C, 1, T>(weight, row_bytes, layer.width, x + t * stride, stride, {}, false, single);
        product_outputs<C, 1, T>(layer, from, single, y, t);
    }
}

// Some columns of R rows of the weight; `next` are those that are read after them, of which each of the first `turns` tiles
// asks for a share.
struct Columns {
    int64_t row, column, columns;
    const uint8_t* next;
    int64_t turn, turns;
};

// Rows t .. end of the batch, T at a time and what is left over fewer at a time. `totals` are those of the columns before.
template <Codec C, int R, int T>
void product_block(const Layer& layer, const float* x, int64_t stride, const Matrix& y, int64_t t, int64_t end, Columns part, float* totals) {
    const int64_t row_bytes = layer.width * value_bytes<C>;
    const uint8_t* weight = static_cast<const uint8_t*>(layer.weight) + part.row * row_bytes + part.column * value_bytes<C>;
    const bool whole = part.columns == layer.width; // nothing to keep for the next columns
    for (; t + T <= end; t += T, totals += whole ? 0 : T * R * CHUNK, ++part.turn) {
        Ahead ahead;
        if (part.turn < part.turns) {
            const int64_t share = R / part.turns;
            ahead = {part.next + part.turn * share * row_bytes, share, row_bytes, chunk_bytes<C>};
        }
        auto& own = *reinterpret_cast<float(*)[T][R][CHUNK]>(totals);
        product_tile<Many, C, R, T>(weight, row_bytes, part.columns, x + t * stride + part.column, stride, ahead, part.column > 0, own);
        if (part.column + part.columns == layer.width) product_outputs<C, R, T>(layer, part.row, own, y, t);
    }
    if constexpr (T > 1)
        if (t < end) product_block<C, R, T - 1>(layer, x, stride, y, t, end, part, totals);
}

// Rows t .. end of the batch, R rows of the weight after the other, DEEP columns at a time.
template <Codec C, int R, int T>
void product_of_many(const Layer& layer, const float* x, int64_t stride, const Matrix& y, int64_t from, int64_t to, int64_t t, int64_t end) {
    const int64_t row_bytes = layer.width * value_bytes<C>;
    int64_t turns = R; // as many tiles as ask for the next rows: with few tiles each asks for several
    while (turns > 1 && (R % turns || turns > (end - t) / T)) --turns;
    float totals[PASS_ROWS * R * CHUNK];
    for (; from + R <= to; from += R)
        for (int64_t column = 0; column < layer.width; column += DEEP) {
            const int64_t columns = column + DEEP < layer.width ? DEEP : layer.width - column;
            const bool last = column + columns == layer.width;
            const uint8_t* next = static_cast<const uint8_t*>(layer.weight) +
                                  (last ? (from + R) * row_bytes : from * row_bytes + (column + columns) * value_bytes<C>);
            product_block<C, R, T>(layer, x, stride, y, t, end, {from, column, columns, next, 0, turns}, totals);
        }
    if constexpr (R > 1)
        if (from < to) product_of_many<C, 1, T>(layer, x, stride, y, from, to, t, end);
}

template <Codec C> void product_of(const Layer& layer, const float* x, int64_t stride, const Matrix& y, int64_t from, int64_t to) {
    if (y.rows < 4) {
        for (int64_t t = 0; t < y.rows; t += FEW_T) product_of_few<C, FEW_R, FEW_T>(layer, x, stride, y, from, to, t);
        return;
    }
    if constexpr (MANY_T >= 4)
        if (y.rows <= MANY_T) return product_of_few<C, MANY_R, MANY_T>(layer, x, stride, y, from, to, 0);
    product_of_many<C, MANY_R, MANY_T>(layer, x, stride, y, from, to, 0, y.rows);
}

inline int64_t pass_rows(int64_t width) {
    const int64_t fit = PASS_FLOATS / width / MANY_T * MANY_T, most = fit < PASS_ROWS ? fit : PASS_ROWS;
    return most > MANY_T ? most : MANY_T;
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
