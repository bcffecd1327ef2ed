// Decoding and gathering with AVX2; the arithmetic is simd_generic.h's.
#pragma once

#include "simd_generic.h"

#include <immintrin.h>

namespace deltaserve {
namespace {

inline F16 pair(__m256 low, __m256 high) {
    F16 r;
    r.v[0] = low;
    r.v[1] = high;
    return r;
}
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
        // the lookup reads three bits: two of this code and one of the next, so the table holds each level twice
        const __m256 levels = _mm256_setr_ps(-1.5f, -0.5f, 0.5f, 1.5f, -1.5f, -0.5f, 0.5f, 1.5f);
        const __m256i shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
        return pair(_mm256_permutevar8x32_ps(levels, _mm256_srlv_epi32(_mm256_set1_epi32(bits), shifts)),
                    _mm256_permutevar8x32_ps(levels, _mm256_srlv_epi32(_mm256_set1_epi32(bits >> 16), shifts)));
    } else if constexpr (C == Codec::sign) {
        const __m256i masks = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        auto half = [&](uint8_t bits) {
            __m256i unset = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), masks), _mm256_setzero_si256());
            __m256i minus = _mm256_and_si256(unset, _mm256_set1_epi32(int32_t(0x80000000)));
            return _mm256_or_ps(_mm256_set1_ps(1), _mm256_castsi256_ps(minus));
        };
        return pair(half(p[0]), half(p[1]));
    } else {
        return decode_generic<C>(p);
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
