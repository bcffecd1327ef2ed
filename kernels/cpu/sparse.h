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

template <class Column> void multiply_factors(const Part& part, const Column* columns, float* values) {
    for (int64_t k = 0; k < part.kept; ++k, values += part.block) {
        const float factor = part.factors ? part.factors[columns[k]] : part.gain;
        for (int v = 0; v < part.block; ++v) values[v] *= factor;
    }
}

// float32 [kept, V] of a block, factors multiplied in: for embeddings and swaps; products have the factors in their x.
inline void decode_block(const Part& part, int64_t block, float* values) {
    decode_line(part.a, block, values);
    if (part.wide_columns)
        multiply_factors(part, static_cast<const int32_t*>(part.columns) + block * part.kept, values);
    else
        multiply_factors(part, static_cast<const uint16_t*>(part.columns) + block * part.kept, values);
}

// sums [R, lanes] += R of the V rows of a block; x [in, lanes]
template <class F, int R, class Column>
inline void sparse_rows(const Part& part, const float* values, const Column* columns, const float* x, float* sums) {
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

// sums [V * blocks, lanes] += blocks first .. first + blocks, whose `values` decode_lines gave; x [in, lanes]
template <class F, class Column>
void sparse_tile(const Part& part, int64_t first, int64_t blocks, const float* values, const float* x, float* sums) {
    constexpr int most = DELTASERVE_ROWS;
    const int V = part.block, rows = V < most ? V : most;
    const Column* columns = static_cast<const Column*>(part.columns) + first * part.kept;
    for (int64_t b = 0; b < blocks; ++b, columns += part.kept, values += padded(part.a.length))
        for (int v = 0; v < V; v += rows, sums += rows * F::lanes) {
            if (rows == 1) sparse_row<F>(part, values, columns, x, sums);
            else if (rows == 4) sparse_rows<F, 4>(part, values + v, columns, x, sums);
            else if (rows == 8) sparse_rows<F, 8>(part, values + v, columns, x, sums);
            else sparse_rows<F, most>(part, values + v, columns, x, sums);
        }
}

} // namespace
} // namespace deltaserve
