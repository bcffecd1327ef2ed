// The vectors of simd_generic.h in AVX-512 (F, BW, VL, DQ): one register is 16 floats.
#pragma once

#include "delta.h"

#include <cstring>
#include <immintrin.h>

namespace deltaserve {
namespace {

struct F16 {
    static constexpr int lanes = 16;
    __m512 v;
};
struct F8 {
    static constexpr int lanes = 8;
    __m256 v;
};

template <class F> inline F load(const float* p);
template <> inline F16 load<F16>(const float* p) { return {_mm512_loadu_ps(p)}; }
template <> inline F8 load<F8>(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, F8 a) { _mm256_storeu_ps(p, a.v); }
template <class F> inline F broadcast(float value);
template <> inline F16 broadcast<F16>(float value) { return {_mm512_set1_ps(value)}; }
template <> inline F8 broadcast<F8>(float value) { return {_mm256_set1_ps(value)}; }
template <class F> inline F zero() { return broadcast<F>(0); }
inline F16 multiply(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F8 add(F8 a, F8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F16 fused(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F8 fused(F8 a, F8 b, F8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 maximum(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 minimum(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 divide(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 times_power(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline F16 blend(int n, F16 a, F16 b) { return {_mm512_mask_blend_ps(__mmask16((1u << n) - 1), b.v, a.v)}; }

template <int V> inline void add_sums(F16 a, float* y) {
    if constexpr (V == 1) {
        *y += _mm512_reduce_add_ps(a.v);
    } else {
        __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
        if constexpr (V == 8) {
            _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), halves));
        } else {
            __m128 quarters = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
            _mm_storeu_ps(y, _mm_add_ps(_mm_loadu_ps(y), quarters));
        }
    }
}

// sums of the lanes of four vectors, by transposition
inline __m128 sum_four(F16 a, F16 b, F16 c, F16 d) {
    auto pair = [](F16 x, F16 z) { return _mm512_add_ps(_mm512_unpacklo_ps(x.v, z.v), _mm512_unpackhi_ps(x.v, z.v)); };
    const __m512d ab = _mm512_castps_pd(pair(a, b)), cd = _mm512_castps_pd(pair(c, d));
    const __m512d low = _mm512_unpacklo_pd(ab, cd), high = _mm512_unpackhi_pd(ab, cd);
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}
// y[r] = sum of the lanes of a[r], always in the same order
template <int R> inline void sum_lanes(const F16 (&a)[R], float* y) {
    int r = 0;
    for (; r + 4 <= R; r += 4) _mm_storeu_ps(y + r, sum_four(a[r], a[r + 1], a[r + 2], a[r + 3]));
    for (; r < R; ++r) y[r] = _mm_cvtss_f32(sum_four(a[r], a[r], a[r], a[r]));
}

template <int V, class Column> inline F16 gather(const float* x, const Column* columns) {
    if constexpr (V == 8) {
        __m512 low = _mm512_set1_ps(x[columns[0]]);
        return {_mm512_mask_broadcastss_ps(low, 0xff00, _mm_load_ss(x + columns[1]))};
    } else if constexpr (V == 4) {
        const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        __m128 four = _mm_setr_ps(x[columns[0]], x[columns[1]], x[columns[2]], x[columns[3]]);
        return {_mm512_permutexvar_ps(spread, _mm512_castps128_ps512(four))};
    } else { // sixteen scalar loads: half as fast again as the gather instruction on Zen 4
        auto half = [x](const Column* c) {
            return _mm256_setr_ps(x[c[0]], x[c[1]], x[c[2]], x[c[3]], x[c[4]], x[c[5]], x[c[6]], x[c[7]]);
        };
        return {_mm512_insertf32x8(_mm512_castps256_ps512(half(columns)), half(columns + 8), 1)};
    }
}

template <Codec C> inline F16 decode(const uint8_t* p) {
    if constexpr (C == Codec::float32) {
        return {_mm512_loadu_ps(p)};
    } else if constexpr (C == Codec::bf16) {
        __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
    } else if constexpr (C == Codec::int8) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
    } else if constexpr (C == Codec::int4) {
        // the lookup reads the low four bits of its index and no more, so nothing need be masked
        const __m512 levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        __m512i bytes = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        return {_mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_permutexvar_epi32(halves, bytes), shifts), levels)};
    } else if constexpr (C == Codec::int2) {
        // as above, with every level four times: two bits of the index belong to the next code
        const __m512 levels = _mm512_broadcast_f32x4(_mm_setr_ps(-1.5f, -0.5f, 0.5f, 1.5f));
        const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        int32_t bits;
        memcpy(&bits, p, 4);
        return {_mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32(bits), shifts), levels)};
    } else {
        uint16_t bits;
        memcpy(&bits, p, 2);
        return {_mm512_mask_blend_ps(bits, _mm512_set1_ps(-1), _mm512_set1_ps(1))};
    }
}

} // namespace
} // namespace deltaserve
