// The sparse part. One row of the batch: values are decoded in registers and meet the broadcast input (V >= 16) or the
// gathered inputs (V < 16) of their columns. Several rows: a block is decoded once, then lanes run over the rows.
#pragma once

#include "delta.h"

namespace deltaserve {
namespace {

// sums[V * b + v] += sum over k of x[columns[b, k]] * values[b, k, v], V >= 16
template <Codec C, int V, class Column>
void sparse_wide(const Part& part, int64_t first, int64_t blocks, const float* x, float* sums) {
    constexpr int across = V / CHUNK;
    const int64_t kept = part.kept;
    const bool one_scale = part.a.group % V == 0; // each column has one scale, not one a chunk
    Scales scales(part.a, first);
    const F16 gain = broadcast<F16>(part.gain);
    for (int64_t b = first; b < first + blocks; ++b, sums += V) {
        const uint8_t* p = part.a.data + b * part.a.line_bytes;
        const Column* columns = static_cast<const Column*>(part.columns) + b * kept;
        F16 total[across][2]; // two chains of sums hide the latency of the addition
        for (auto& chunk : total) chunk[0] = chunk[1] = zero<F16>();
        auto column = [&](int64_t k, int chain) {
            float input = x[columns[k]];
            if (has_scales<C> && one_scale) input *= scales.shared(V);
            F16 inputs = broadcast<F16>(input);
            for (int i = 0; i < across; ++i, p += chunk_bytes<C>) {
                F16 values = decode<C>(p);
                if (has_scales<C> && !one_scale) values = multiply(values, scales.next(CHUNK));
                total[i][chain] = fused(values, inputs, total[i][chain]);
            }
        };
        int64_t k = 0;
        for (; k + 1 < kept; k += 2) {
            column(k, 0);
            column(k + 1, 1);
        }
        if (k < kept) column(k, 0);
        for (int i = 0; i < across; ++i) {
            float* at = sums + CHUNK * i;
            store(at, fused(add(total[i][0], total[i][1]), gain, load<F16>(at)));
        }
    }
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

// Blocks first .. first + blocks for one row of the batch; x [in] with `factors` multiplied in.
inline void sparse_single(const Part& part, int64_t first, int64_t blocks, const float* x, float* sums) {
    if (part.wide_columns) // inputs beyond 65536 are rare: layout.py stores such values as float32
        return sparse_single_for<Codec::float32, int32_t>(part.block)(part, first, blocks, x, sums);
    with_codec(part.a.codec, [&](auto codec) {
        sparse_single_for<decltype(codec)::value, uint16_t>(part.block)(part, first, blocks, x, sums);
    });
}

// values [kept, V] of a block times the factors of their columns
template <class Column> void multiply_factors(const Part& part, const Column* columns, float* values) {
    const int V = part.block;
    for (int64_t k = 0; k < part.kept; ++k, values += V) {
        float factor = part.factors ? part.factors[columns[k]] : part.gain;
        for (int v = 0; v < V; ++v) values[v] *= factor;
    }
}

// `values` [kept, V] of one block as float32, factors multiplied in; needs kept * V + CHUNK floats.
inline void decode_block(const Part& part, int64_t block, float* values) {
    decode_line(part.a, block, values);
    if (part.wide_columns)
        multiply_factors(part, static_cast<const int32_t*>(part.columns) + block * part.kept, values);
    else
        multiply_factors(part, static_cast<const uint16_t*>(part.columns) + block * part.kept, values);
}

// sums [R, lanes] += R of the V rows of a block; x [in, lanes]
template <class F, int R, class Column>
inline void sparse_rows(const float* values, int V, const Column* columns, int64_t kept, const float* x, float* sums) {
    F total[R];
    for (int r = 0; r < R; ++r) total[r] = load<F>(sums + r * F::lanes);
    for (int64_t k = 0; k < kept; ++k, values += V) {
        F inputs = load<F>(x + int64_t(columns[k]) * F::lanes);
        for (int r = 0; r < R; ++r) total[r] = fused(broadcast<F>(values[r]), inputs, total[r]);
    }
    for (int r = 0; r < R; ++r) store(sums + r * F::lanes, total[r]);
}

// V = 1: four chains of sums hide the latency that R rows hide above
template <class F, class Column>
inline void sparse_row(const float* values, const Column* columns, int64_t kept, const float* x, float* sums) {
    F total[4] = {load<F>(sums), zero<F>(), zero<F>(), zero<F>()};
    auto step = [&](int64_t k, F& into) {
        into = fused(broadcast<F>(values[k]), load<F>(x + int64_t(columns[k]) * F::lanes), into);
    };
    int64_t k = 0;
    for (; k + 3 < kept; k += 4)
        for (int i = 0; i < 4; ++i) step(k + i, total[i]);
    for (; k < kept; ++k) step(k, total[0]);
    store(sums, add(add(total[0], total[1]), add(total[2], total[3])));
}

// sums [V * blocks, lanes] += blocks first .. first + blocks; `values` is scratch for decode_block
template <class F, class Column>
void sparse_tile(const Part& part, int64_t first, int64_t blocks, const float* x, float* sums, float* values) {
    constexpr int most = DELTASERVE_ROWS;
    const int V = part.block;
    for (int64_t b = first; b < first + blocks; ++b) {
        const Column* columns = static_cast<const Column*>(part.columns) + b * part.kept;
        decode_block(part, b, values);
        for (int v = 0; v < V;) {
            float* at = sums + ((b - first) * V + v) * F::lanes;
            int rows = V < most ? V : most;
            if (rows == 1) sparse_row<F>(values, columns, part.kept, x, at);
            else if (rows == 4) sparse_rows<F, 4>(values + v, V, columns, part.kept, x, at);
            else if (rows == 8) sparse_rows<F, 8>(values + v, V, columns, part.kept, x, at);
            else sparse_rows<F, most>(values + v, V, columns, part.kept, x, at);
            v += rows;
        }
    }
}

} // namespace
} // namespace deltaserve
