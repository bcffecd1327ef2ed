// Numbers of activations and weights: float32, bfloat16, float16, read and written through float32; 4x4 transposition.
#pragma once

#include "delta.h"

namespace deltaserve {
namespace {

struct Bf16 {
    uint16_t bits;
};
#if defined(__aarch64__)
typedef __fp16 Float16; // GCC knows _Float16 in C++ for ARM only from version 13
#else
typedef _Float16 Float16;
#endif
struct Half {
    Float16 value;
};

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) { return bf16_to_float(value.bits); }
inline float to_float(Half half) { return float(half.value); }

template <class T> inline T rounded(float value);
template <> inline float rounded<float>(float value) { return value; }
template <> inline Half rounded<Half>(float value) { return {Float16(value)}; }
// to nearest, ties to even; a NaN stays one
template <> inline Bf16 rounded<Bf16>(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return {uint16_t(value != value ? 0x7fc0 : nearest)};
}

// Calls `run` with a null pointer of the type that `dtype` names.
template <class Run> inline void with_dtype(Dtype dtype, Run run) {
    switch (dtype) {
        case Dtype::float32: return run(static_cast<float*>(nullptr));
        case Dtype::bf16: return run(static_cast<Bf16*>(nullptr));
        case Dtype::float16: return run(static_cast<Half*>(nullptr));
    }
}

template <class T> inline T* row_of(const Matrix& m, int64_t row) { return static_cast<T*>(m.data) + row * m.stride; }

template <class T> inline void add_to_row(T* y, const float* addend, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] = rounded<T>(to_float(y[i]) + addend[i]);
}

typedef float Four __attribute__((vector_size(16)));

inline Four load4(const float* p) {
    Four r;
    memcpy(&r, p, sizeof r);
    return r;
}
template <class T> inline Four load4(const T* p) { return Four{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }

// rows r[0..3] become columns
inline void transpose4(Four (&r)[4]) {
    Four a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
    Four c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    r[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
    r[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
    r[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
    r[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

} // namespace
} // namespace deltaserve
