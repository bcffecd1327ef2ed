// The vectors of simd_generic.h in AVX2: 16 floats are two registers, by name, because arrays of them would not stay in
// registers.
#pragma once

#include "delta.h"

#include <cstring>
#include <immintrin.h>

namespace deltaserve {
namespace {

struct F16 {
    static constexpr int lanes = 16;
    __m256 low, high;
};
struct F8 {
    static constexpr int lanes = 8;
    __m256 v;
};

template <class F> inline F load(const float* p);
template <> inline F16 load<F16>(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
template <> inline F8 load<F8>(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, F16 a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
}
inline void store(float* p, F8 a) { _mm256_storeu_ps(p, a.v); }
template <class F> inline F broadcast(float value);
template <> inline F16 broadcast<F16>(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
template <> inline F8 broadcast<F8>(float value) { return {_mm256_set1_ps(value)}; }
template <class F> inline F zero() { return broadcast<F>(0); }
inline F16 multiply(F16 a, F16 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline F16 add(F16 a, F16 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline F8 add(F8 a, F8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F16 fused(F16 a, F16 b, F16 c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
inline F8 fused(F8 a, F8 b, F8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 maximum(F16 a, F16 b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline F16 minimum(F16 a, F16 b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline F16 divide(F16 a, F16 b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline F16 times_power(F16 a, F16 n) {
    auto half = [](__m256 x, __m256 power) {
        const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127)), 23);
        return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
    };
    return {half(a.low, n.low), half(a.high, n.high)};
}
inline F16 blend(int n, F16 a, F16 b) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    auto half = [lane](int most, __m256 x, __m256 y) {
        return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(most), lane)));
    };
    return {half(n, a.low, b.low), half(n - 8, a.high, b.high)};
}

template <int V> inline void add_sums(F16 a, float* y) {
    const __m256 eight = _mm256_add_ps(a.low, a.high);
    if constexpr (V == 8) return _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), eight));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    if constexpr (V == 4) return _mm_storeu_ps(y, _mm_add_ps(_mm_loadu_ps(y), four));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    *y += _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// sums of the lanes of four vectors, by transposition
inline __m128 sum_four(F16 a, F16 b, F16 c, F16 d) {
    auto pair = [](F16 x, F16 z) { return _mm256_hadd_ps(_mm256_add_ps(x.low, x.high), _mm256_add_ps(z.low, z.high)); };
    const __m256 all = _mm256_hadd_ps(pair(a, b), pair(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}
// y[r] = sum of the lanes of a[r], always in the same order
template <int R> inline void sum_lanes(const F16 (&a)[R], float* y) {
    int r = 0;
    for (; r + 4 <= R; r += 4) _mm_storeu_ps(y + r, sum_four(a[r], a[r + 1], a[r + 2], a[r + 3]));
    for (; r < R; ++r) y[r] = _mm_cvtss_f32(sum_four(a[r], a[r], a[r], a[r]));
}

inline F16 pair(__m256 low, __m256 high) { return {low, high}; }
inline F16 from_bytes(__m128i bytes) {
    return pair(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))));
}

template <Codec C> inline F16 decode(const uint8_t* p) {
    if constexpr (C == Codec::bf16) {
        auto half = [](const uint8_t* at) {
            __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
            return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
        };
        return pair(half(p), half(p + 16));
    } else if constexpr (C == Codec::int8) {
        return from_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    } else if constexpr (C == Codec::int4) {
        __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
        __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
        return from_bytes(_mm_sub_epi8(_mm_unpacklo_epi8(low, high), _mm_set1_epi8(8)));
    } else if constexpr (C == Codec::int2) {
        int32_t bits;
        memcpy(&bits, p, 4);
        const __m256i codes = _mm256_set1_epi32(bits); // the lookup reads the lowest two bits of each
        const __m256 levels = _mm256_setr_ps(-1.5f, -0.5f, 0.5f, 1.5f, -1.5f, -0.5f, 0.5f, 1.5f);
        auto half = [&](__m256i shifts) { return _mm256_permutevar_ps(levels, _mm256_srlv_epi32(codes, shifts)); };
        return pair(half(_mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14)), half(_mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30)));
    } else if constexpr (C == Codec::sign) {
        const __m256i masks = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        auto half = [&](uint8_t bits) {
            __m256i unset = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), masks), _mm256_setzero_si256());
            __m256i minus = _mm256_and_si256(unset, _mm256_set1_epi32(int32_t(0x80000000)));
            return _mm256_or_ps(_mm256_set1_ps(1), _mm256_castsi256_ps(minus));
        };
        return pair(half(p[0]), half(p[1]));
    } else {
        return load<F16>(reinterpret_cast<const float*>(p));
    }
}

// eight values of a weight
template <Codec C> inline F8 decode_half(const uint8_t* p) {
    if constexpr (C == Codec::bf16) {
        const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
    } else if constexpr (C == Codec::int8) {
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
    } else {
        return load<F8>(reinterpret_cast<const float*>(p));
    }
}

// Scalar loads for V < 16: gather instructions of AVX2 machines are no faster.
template <int V, class Column> inline F16 gather(const float* x, const Column* columns) {
    if constexpr (V == 8) {
        return pair(_mm256_broadcast_ss(x + columns[0]), _mm256_broadcast_ss(x + columns[1]));
    } else if constexpr (V == 4) {
        auto half = [x](const Column* c) { return _mm256_set_m128(_mm_broadcast_ss(x + c[1]), _mm_broadcast_ss(x + c[0])); };
        return pair(half(columns), half(columns + 2));
    } else {
        auto half = [x](const Column* c) {
            return _mm256_setr_ps(x[c[0]], x[c[1]], x[c[2]], x[c[3]], x[c[4]], x[c[5]], x[c[6]], x[c[7]]);
        };
        return pair(half(columns), half(columns + 8));
    }
}

} // namespace
} // namespace deltaserve
