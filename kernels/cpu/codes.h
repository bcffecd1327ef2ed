// Lines of packed values, 16 at a time, and the running scale that goes with them.
#pragma once

#include "delta.h"

namespace deltaserve {
namespace {

template <Codec C> constexpr int chunk_bytes =
    C == Codec::float32 ? 64 : C == Codec::bf16 ? 32 : C == Codec::int8 ? 16 : C == Codec::int4 ? 8 : C == Codec::int2 ? 4 : 2;
template <Codec C> constexpr bool has_scales = C != Codec::float32 && C != Codec::bf16;

inline float bf16_to_float(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

// The scale of the next values. Groups are at least a chunk long, so a chunk has one scale or two.
class Scales {
  public:
    Scales(const Codes& codes, int64_t line) : group(codes.group) {
        if (!codes.scales) return;
        int64_t position = line * codes.length;
        next_scale = codes.scales + position / group;
        left = group - position % group;
        if (left) value = bf16_to_float(*next_scale++);
    }
    // n <= 16: the scales of the next n values in the first n lanes
    F16 next(int n) {
        if (left == 0) refill();
        if (n <= left) {
            left -= n;
            return broadcast<F16>(value);
        }
        F16 first = broadcast<F16>(value);
        int before = int(left);
        refill();
        left -= n - before;
        return blend(before, first, broadcast<F16>(value));
    }
  private:
    void refill() {
        value = bf16_to_float(*next_scale++);
        left = group;
    }
    const uint16_t* next_scale = nullptr;
    int64_t left = 0, group;
    float value = 1;
};

inline int64_t padded(int64_t values) { return (values + CHUNK - 1) / CHUNK * CHUNK; }

template <Codec C> void decode_lines(const Codes& codes, int64_t first, int64_t count, float* out) {
    Scales scales(codes, first);
    for (int64_t line = first; line < first + count; ++line) {
        const uint8_t* p = codes.data + line * codes.line_bytes;
        for (int64_t left = codes.length; left > 0; left -= CHUNK, p += chunk_bytes<C>, out += CHUNK) {
            F16 values = decode<C>(p);
            if constexpr (has_scales<C>) values = multiply(values, scales.next(left < CHUNK ? int(left) : CHUNK));
            store(out, values);
        }
    }
}

// Calls `run` with the codec as a compile-time constant.
template <class Run> inline void with_codec(Codec codec, Run run) {
    switch (codec) {
        case Codec::float32: return run(std::integral_constant<Codec, Codec::float32>{});
        case Codec::bf16: return run(std::integral_constant<Codec, Codec::bf16>{});
        case Codec::int8: return run(std::integral_constant<Codec, Codec::int8>{});
        case Codec::int4: return run(std::integral_constant<Codec, Codec::int4>{});
        case Codec::int2: return run(std::integral_constant<Codec, Codec::int2>{});
        case Codec::sign: return run(std::integral_constant<Codec, Codec::sign>{});
    }
}

// float32 [count, padded(length)] of some lines; what follows a line's values there means nothing.
inline void decode_lines(const Codes& codes, int64_t first, int64_t count, float* out) {
    with_codec(codes.codec, [&](auto codec) { decode_lines<decltype(codec)::value>(codes, first, count, out); });
}
inline void decode_line(const Codes& codes, int64_t line, float* out) { decode_lines(codes, line, 1, out); }

} // namespace
} // namespace deltaserve
