// The sparse part. One row of the batch: values are decoded in registers and meet the broadcast input (V >= 16) or the
// gathered inputs (V < 16) of their columns. Several rows: a block is decoded once, then vectors run over its rows (V >= 16) or
// over those of the batch.
#pragma once

#include "delta.h"

namespace deltaserve {
namespace {

// sums[V * b + v] += sum over k of x[columns[b, k]] * values[b, k, v], V >= 16. Column `at` of the part has scale at >> shift.
template <Codec C, int V, bool has_factors, class Column>
void sparse_shifted(const Part& part, int64_t first, int64_t blocks, const float* x, float* sums, int shift) {
    constexpr int across = V / CHUNK;
    const int64_t kept = part.kept;
    const float* factors = part.factors;
    const uint16_t* scales = part.a.scales;
    const F16 gain = broadcast<F16>(part.gain);
    const Column* columns = static_cast<const Column*>(part.columns);
    const int64_t line_bytes = part.a.line_bytes;
    const uint8_t* line = part.a.data + first * line_bytes;
    int64_t at = first * kept;
    for (int64_t b = first; b < first + blocks; ++b, line += line_bytes, sums += V) {
        const uint8_t* values = line;
        F16 total[across][2];
        UNROLLED for (int i = 0; i < across; ++i) total[i][0] = total[i][1] = zero<F16>();
        auto column = [&](int chain) {
            float input = x[columns[at]];
            if constexpr (has_factors) input *= factors[columns[at]];
            if constexpr (has_scales<C>) input *= bf16_to_float(scales[at >> shift]);
            const F16 inputs = broadcast<F16>(input);
            ++at;
            UNROLLED for (int i = 0; i < across; ++i, values += chunk_bytes<C>)
                total[i][chain] = fused(decode<C>(values), inputs, total[i][chain]);
        };
        for (int64_t k = kept / 2; k > 0; --k) {
            column(0);
            column(1);
        }
        if (kept & 1) column(0);
        UNROLLED for (int i = 0; i < across; ++i) {
            float* sum = sums + CHUNK * i;
            store(sum, fused(add(total[i][0], total[i][1]), gain, load<F16>(sum)));
        }
    }
}

// The same where scales cover other numbers of columns, or parts of one.
template <Codec C, int V, class Column>
void sparse_scaled(const Part& part, int64_t first, int64_t blocks, const float* x, float* sums) {
    Scales scales(part.a, first);
    const F16 gain = broadcast<F16>(part.gain);
    const Column* columns = static_cast<const Column*>(part.columns) + first * part.kept;
    for (int64_t b = first; b < first + blocks; ++b, columns += part.kept, sums += V) {
        const uint8_t* values = part.a.data + b * part.a.line_bytes;
        for (int64_t k = 0; k < part.kept; ++k) {
            const F16 inputs = multiply(gain, broadcast<F16>(x[columns[k]] * (part.factors ? part.factors[columns[k]] : 1)));
            for (int v = 0; v < V; v += CHUNK, values += chunk_bytes<C>)
                store(sums + v, fused(multiply(decode<C>(values), scales.next(CHUNK)), inputs, load<F16>(sums + v)));
        }
    }
}

// n where `value` is 2 to the n, else -1
inline int exponent_of_two(int64_t value) { return value > 0 && !(value & (value - 1)) ? __builtin_ctzll(value) : -1; }

template <Codec C, int V, class Column> void sparse_wide(const Part& part, int64_t first, int64_t blocks, const float* x, float* sums) {
    const int shift = !has_scales<C> ? 0 : part.a.group % V ? -1 : exponent_of_two(part.a.group / V);
    if (shift < 0) sparse_scaled<C, V, Column>(part, first, blocks, x, sums);
    else if (part.factors) sparse_shifted<C, V, true, Column>(part, first, blocks, x, sums, shift);
    else sparse_shifted<C, V, false, Column>(part, first, blocks, x, sums, shift);
}

// The same for V < 16: a chunk holds the values of 16 / V columns.
template <Codec C, int V, class Column>
void sparse_narrow(const Part& part, int64_t first, int64_t blocks, const float* x, float* sums) {
    const int64_t kept = part.kept, whole = part.a.length / CHUNK;
    const int rest = int(part.a.length % CHUNK);
    Scales scales(part.a, first);
    const F16 gain = broadcast<F16>(part.gain);
    for (int64_t b = first; b < first + blocks; ++b, sums += V) {
        const uint8_t* p = part.a.data + b * part.a.line_bytes;
        const Column* columns = static_cast<const Column*>(part.columns) + b * kept;
        auto chunk = [&](int n) {
            F16 values = decode<C>(p);
            if constexpr (has_scales<C>) values = multiply(values, scales.next(n));
            F16 products = multiply(values, gather<V>(x, columns));
            if (part.factors) products = multiply(products, gather<V>(part.factors, columns));
            p += chunk_bytes<C>;
            columns += CHUNK / V;
            return products;
        };
        F16 total = zero<F16>();
        for (int64_t i = 0; i < whole; ++i) total = add(total, chunk(CHUNK));
        if (rest) total = add(total, blend(rest, chunk(rest), zero<F16>()));
        add_sums<V>(multiply(total, gain), sums);
    }
}

using SparseSingle = void (*)(const Part&, int64_t, int64_t, const float*, float*);

template <Codec C, class Column> SparseSingle sparse_single_for(int block) {
    switch (block) {
        case 1: return sparse_narrow<C, 1, Column>;
        case 4: return sparse_narrow<C, 4, Column>;
        case 8: return sparse_narrow<C, 8, Column>;
        case 16: return sparse_wide<C, 16, Column>;
        case 32: return sparse_wide<C, 32, Column>;
        default: return sparse_wide<C, 64, Column>;
    }
}

// Blocks first .. first + blocks for one row of the batch.
inline void sparse_single(const Part& part, int64_t first, int64_t blocks, const float* x, float* sums) {
    if (part.wide_columns) // inputs beyond 65536 are rare: layout.py stores such values as float32
        return sparse_single_for<Codec::float32, int32_t>(part.block)(part, first, blocks, x, sums);
    with_codec(part.a.codec, [&](auto codec) {
        sparse_single_for<decltype(codec)::value, uint16_t>(part.block)(part, first, blocks, x, sums);
    });
}

template <class Column> void multiply_factors(const Part& part, const Column* columns, float* values) {
    for (int64_t k = 0; k < part.kept; ++k, values += part.block) {
        const float factor = part.factors ? part.factors[columns[k]] : part.gain;
        int v = 0;
        for (; v + CHUNK <= part.block; v += CHUNK) store(values + v, multiply(load<F16>(values + v), broadcast<F16>(factor)));
        for (; v < part.block; ++v) values[v] *= factor;
    }
}

// float32 [kept, V] of a block, factors multiplied in.
inline void decode_block(const Part& part, int64_t block, float* values) {
    decode_line(part.a, block, values);
    if (part.wide_columns)
        multiply_factors(part, static_cast<const int32_t*>(part.columns) + block * part.kept, values);
    else
        multiply_factors(part, static_cast<const uint16_t*>(part.columns) + block * part.kept, values);
}

constexpr int ROWS_T = DELTASERVE_ROWS == 16 ? 8 : DELTASERVE_ROWS == 8 ? 6 : 2; // rows of the batch whose sums the registers hold

// The columns of a matrix that keeps all of them.
struct Ascending {
    int64_t operator[](int64_t k) const { return k; }
};

// sums[t][at .. at + CHUNK] += sum over k of values[k * step ..] * x[t][columns[k]] for `count` rows of the batch, T at a time and
// what is left over fewer at a time.
template <int T, class Columns>
void add_chunk(const float* values, int64_t step, int64_t kept, Columns columns, const float* const* x, int64_t count, float* const* sums,
               int64_t at) {
    for (; count >= T; count -= T, x += T, sums += T) {
        const float* rows[T];
        F16 total[T];
        UNROLLED for (int t = 0; t < T; ++t) rows[t] = x[t], total[t] = zero<F16>();
        const float* value = values;
        for (int64_t k = 0; k < kept; ++k, value += step) {
            const int64_t column = columns[k];
            const F16 own = load<F16>(value);
            UNROLLED for (int t = 0; t < T; ++t) total[t] = fused(own, broadcast<F16>(rows[t][column]), total[t]);
        }
        UNROLLED for (int t = 0; t < T; ++t) store(sums[t] + at, add(load<F16>(sums[t] + at), total[t]));
    }
    if constexpr (T > 1)
        if (count) add_chunk<T - 1>(values, step, kept, columns, x, count, sums, at);
}

// sums[t] [V * blocks] += blocks first .. first + blocks, V >= 16, for `count` rows of the batch
template <class Column>
void sparse_rows(const Part& part, int64_t first, int64_t blocks, const float* const* x, int64_t count, float* const* sums, float* scratch) {
    const Column* columns = static_cast<const Column*>(part.columns) + first * part.kept;
    for (int64_t b = 0; b < blocks; ++b, columns += part.kept) {
        decode_block(part, first + b, scratch);
        for (int v = 0; v < part.block; v += CHUNK)
            add_chunk<ROWS_T>(scratch + v, part.block, part.kept, columns, x, count, sums, b * part.block + v);
    }
}

inline void sparse_rows(const Part& part, int64_t first, int64_t blocks, const float* const* x, int64_t count, float* const* sums, float* scratch) {
    if (count == 1) sparse_single(part, first, blocks, x[0], sums[0]);
    else if (part.wide_columns) sparse_rows<int32_t>(part, first, blocks, x, count, sums, scratch);
    else sparse_rows<uint16_t>(part, first, blocks, x, count, sums, scratch);
}

// sums [R, lanes] += R of the V rows of a block, V < 16; x [in, lanes]
template <class F, int R, class Column>
inline void sparse_lanes(const Part& part, const float* values, const Column* columns, const float* x, float* sums) {
    const int V = part.block;
    F total[R];
    for (int r = 0; r < R; ++r) total[r] = zero<F>();
    for (int64_t k = 0; k < part.kept; ++k, values += V) {
        const F inputs = load<F>(x + int64_t(columns[k]) * F::lanes);
        for (int r = 0; r < R; ++r) total[r] = fused(broadcast<F>(values[r]), inputs, total[r]);
    }
    const F gain = broadcast<F>(part.gain);
    for (int r = 0; r < R; ++r) store(sums + r * F::lanes, fused(total[r], gain, load<F>(sums + r * F::lanes)));
}

// V = 1: four chains of sums hide the latency that R rows hide above
template <class F, class Column>
inline void sparse_row(const Part& part, const float* values, const Column* columns, const float* x, float* sums) {
    F total[4] = {zero<F>(), zero<F>(), zero<F>(), zero<F>()};
    auto step = [&](int64_t k, F& into) {
        into = fused(broadcast<F>(values[k]), load<F>(x + int64_t(columns[k]) * F::lanes), into);
    };
    int64_t k = 0;
    for (; k + 3 < part.kept; k += 4)
        for (int i = 0; i < 4; ++i) step(k + i, total[i]);
    for (; k < part.kept; ++k) step(k, total[0]);
    const F all = add(add(total[0], total[1]), add(total[2], total[3]));
    store(sums, fused(all, broadcast<F>(part.gain), load<F>(sums)));
}

// sums [V * blocks, lanes] += blocks first .. first + blocks, V < 16, whose `values` decode_lines gave; x [in, lanes]
template <class F, class Column>
void sparse_tile(const Part& part, int64_t first, int64_t blocks, const float* values, const float* x, float* sums) {
    constexpr int most = DELTASERVE_ROWS < 8 ? DELTASERVE_ROWS : 8;
    const int V = part.block, rows = V < most ? V : most;
    const Column* columns = static_cast<const Column*>(part.columns) + first * part.kept;
    for (int64_t b = 0; b < blocks; ++b, columns += part.kept, values += padded(part.a.length))
        for (int v = 0; v < V; v += rows, sums += rows * F::lanes) {
            if (rows == 1) sparse_row<F>(part, values, columns, x, sums);
            else if (rows == 4) sparse_lanes<F, 4>(part, values + v, columns, x, sums);
            else sparse_lanes<F, most>(part, values + v, columns, x, sums);
        }
}

} // namespace
} // namespace deltaserve
