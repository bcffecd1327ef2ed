// Vectors of 16 and 8 floats out of the compiler's own vectors: NEON on ARM, SSE2 on x86, AVX where the file is compiled for
// it (DELTASERVE_NATIVE floats to a register). What the compiler cannot express, decoding and gathering, is plain code
// here and intrinsics in simd_avx2.h.
#pragma once

#include "delta.h"

#include <cstring>

namespace deltaserve {
namespace {

typedef float Native __attribute__((vector_size(4 * DELTASERVE_NATIVE)));

template <int N> struct Floats {
    static constexpr int lanes = N, count = N / DELTASERVE_NATIVE;
    Native v[count];
};
using F16 = Floats<16>;
using F8 = Floats<8>;

template <class F> inline F load(const float* p) {
    F r;
    for (int i = 0; i < F::count; ++i) memcpy(&r.v[i], p + i * DELTASERVE_NATIVE, sizeof(Native));
    return r;
}
template <int N> inline void store(float* p, Floats<N> a) {
    for (int i = 0; i < a.count; ++i) memcpy(p + i * DELTASERVE_NATIVE, &a.v[i], sizeof(Native));
}
template <class F> inline F broadcast(float value) {
    F r;
    for (int i = 0; i < F::count; ++i) r.v[i] = value - Native{};
    return r;
}
template <class F> inline F zero() { return broadcast<F>(0); }
template <int N> inline Floats<N> multiply(Floats<N> a, Floats<N> b) {
    for (int i = 0; i < a.count; ++i) a.v[i] *= b.v[i];
    return a;
}
template <int N> inline Floats<N> add(Floats<N> a, Floats<N> b) {
    for (int i = 0; i < a.count; ++i) a.v[i] += b.v[i];
    return a;
}
// a * b + c
template <int N> inline Floats<N> fused(Floats<N> a, Floats<N> b, Floats<N> c) {
    for (int i = 0; i < a.count; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
}
inline F16 maximum(F16 a, F16 b) {
    for (int i = 0; i < a.count; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
inline F16 minimum(F16 a, F16 b) {
    for (int i = 0; i < a.count; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
}
inline F16 divide(F16 a, F16 b) {
    for (int i = 0; i < a.count; ++i) a.v[i] /= b.v[i];
    return a;
}
// a * 2^n for whole n from -126 to 127
inline F16 times_power(F16 a, F16 n) {
    typedef int32_t Whole __attribute__((vector_size(sizeof(Native))));
    for (int i = 0; i < a.count; ++i) {
        const Whole bits = (__builtin_convertvector(n.v[i], Whole) + 127) << 23;
        Native power;
        memcpy(&power, &bits, sizeof power);
        a.v[i] *= power;
    }
    return a;
}
// lanes below n from a, the others from b
inline F16 blend(int n, F16 a, F16 b) {
    typedef int32_t Mask __attribute__((vector_size(sizeof(Native))));
    Mask lane;
    for (int i = 0; i < DELTASERVE_NATIVE; ++i) lane[i] = i;
    for (int i = 0; i < F16::count; ++i, n -= DELTASERVE_NATIVE) a.v[i] = lane < n ? a.v[i] : b.v[i];
    return a;
}

// y[v] += sum of the lanes i with i % V == v
template <int V> inline void add_sums(F16 a, float* y) {
    F8 eight;
    for (int i = 0; i < F8::count; ++i) eight.v[i] = a.v[i] + a.v[i + F8::count];
    if constexpr (V == 8) return store(y, add(load<F8>(y), eight));
    float four[8];
    store(four, eight);
    for (int i = 0; i < 4; ++i) four[i] += four[i + 4];
    if constexpr (V == 1) *y += (four[0] + four[2]) + (four[1] + four[3]);
    else for (int v = 0; v < 4; ++v) y[v] += four[v];
}

// y[r] = sum of the lanes of a[r], always in the same order
template <int R> inline void sum_lanes(const F16 (&a)[R], float* y) {
    for (int r = 0; r < R; ++r) {
        float lanes[16];
        store(lanes, a[r]);
        for (int width = 8; width; width /= 2)
            for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
        y[r] = lanes[0];
    }
}

// lane i is x[columns[i / V]]
template <int V, class Column> inline F16 gather_generic(const float* x, const Column* columns) {
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = x[columns[i / V]];
    return load<F16>(lanes);
}

// N values as codes.py packs them, without their scale
template <Codec C, int N = 16> inline Floats<N> decode_generic(const uint8_t* p) {
    float r[N];
    if constexpr (C == Codec::float32) memcpy(r, p, sizeof r);
    for (int i = 0; i < N; ++i) {
        if constexpr (C == Codec::bf16) {
            uint32_t bits = uint32_t(p[2 * i]) << 16 | uint32_t(p[2 * i + 1]) << 24;
            memcpy(&r[i], &bits, 4);
        }
        if constexpr (C == Codec::int8) r[i] = int8_t(p[i]);
        if constexpr (C == Codec::int4) r[i] = (p[i / 2] >> (i % 2 * 4) & 15) - 8;
        if constexpr (C == Codec::int2) r[i] = (p[i / 4] >> (i % 4 * 2) & 3) - 1.5f;
        if constexpr (C == Codec::sign) r[i] = (p[i / 8] >> (i % 8) & 1) * 2 - 1;
    }
    return load<Floats<N>>(r);
}

#if DELTASERVE_NATIVE == 4
template <int V, class Column> inline F16 gather(const float* x, const Column* columns) {
    return gather_generic<V>(x, columns);
}
template <Codec C> inline F16 decode(const uint8_t* p) { return decode_generic<C>(p); }
template <Codec C> inline F8 decode_half(const uint8_t* p) { return decode_generic<C, 8>(p); }
#endif

} // namespace
} // namespace deltaserve
