// Attention of one row over some keys of a paged cache. Keys and values are read in place, in the order in which they lie
// in memory, once for all the heads that share them. The sums' order depends on nothing but the row's own keys.
#pragma once

#include "attention.h"

namespace deltaserve {
namespace {

// e^x within some units of the last place, x limited to what float32 can hold
inline F16 exponential(F16 x) {
    constexpr float rounding = 12582912; // 1.5 * 2^23: added and taken away again it leaves a whole number
    x = minimum(maximum(x, broadcast<F16>(-87.3f)), broadcast<F16>(88.3f));
    const F16 n = add(fused(x, broadcast<F16>(1.44269504f), broadcast<F16>(rounding)), broadcast<F16>(-rounding));
    x = fused(n, broadcast<F16>(-0.693359375f), x);
    x = fused(n, broadcast<F16>(2.12194440e-4f), x);
    F16 sum = broadcast<F16>(1.9875691500e-4f);
    constexpr float rest[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1, 1};
    for (float coefficient : rest)
        sum = fused(sum, x, broadcast<F16>(coefficient));
    return times_power(sum, n);
}

// Heads of one key whose sums the registers hold, keys at a time for scores, and chunks of a value at a time.
#if DELTASERVE_ROWS == 16
constexpr int SHARING = 4, TOGETHER = 4, WIDE = 4;
#else
constexpr int SHARING = 3, TOGETHER = 2, WIDE = 2;
#endif

// scores[g][k] of G heads at `stride`, K keys
template <Codec C, int G, int K>
inline void score_tile(const float* query, const uint8_t* key, int64_t row_bytes, int64_t width, float scale, float* scores) {
    constexpr int64_t value_bytes = chunk_bytes<C> / CHUNK;
    F16 total[G * K];
    for (F16& sum : total) sum = zero<F16>();
    int64_t d = 0;
    for (; d + CHUNK <= width; d += CHUNK) {
        F16 values[K];
        for (int k = 0; k < K; ++k) values[k] = decode<C>(key + k * row_bytes + d * value_bytes);
        for (int g = 0; g < G; ++g) {
            const F16 inputs = load<F16>(query + g * width + d);
            for (int k = 0; k < K; ++k) total[g * K + k] = fused(inputs, values[k], total[g * K + k]);
        }
    }
    if (d < width) { // the last chunk of a head, filled up with zeros
        for (int k = 0; k < K; ++k) {
            uint8_t bytes[chunk_bytes<C>] = {};
            memcpy(bytes, key + k * row_bytes + d * value_bytes, (width - d) * value_bytes);
            const F16 values = decode<C>(bytes);
            for (int g = 0; g < G; ++g) {
                float inputs[CHUNK] = {};
                memcpy(inputs, query + g * width + d, (width - d) * sizeof(float));
                total[g * K + k] = fused(load<F16>(inputs), values, total[g * K + k]);
            }
        }
    }
    float sums[G * K];
    sum_lanes<G * K>(total, sums);
    for (int g = 0; g < G; ++g)
        for (int k = 0; k < K; ++k) scores[g * KEYS + k] = sums[g * K + k] * scale;
}

template <Codec C, int G> inline void score(const float* query, const uint8_t* key, int64_t row_bytes, int64_t width, int64_t keys,
                                            float scale, float* scores) {
    int64_t k = 0;
    for (; k + TOGETHER <= keys; k += TOGETHER)
        score_tile<C, G, TOGETHER>(query, key + k * row_bytes, row_bytes, width, scale, scores + k);
    for (; k < keys; ++k) score_tile<C, G, 1>(query, key + k * row_bytes, row_bytes, width, scale, scores + k);
}

// sums[g][W chunks] += weights[g][k] * value k
template <Codec C, int G, int W>
inline void weigh_tile(const float* weights, const uint8_t* value, int64_t row_bytes, int64_t width, int64_t keys, float* sums) {
    F16 total[G][W];
    for (int g = 0; g < G; ++g)
        for (int w = 0; w < W; ++w) total[g][w] = load<F16>(sums + g * width + w * CHUNK);
    for (int64_t k = 0; k < keys; ++k, value += row_bytes) {
        F16 values[W];
        for (int w = 0; w < W; ++w) values[w] = decode<C>(value + w * chunk_bytes<C>);
        for (int g = 0; g < G; ++g) {
            const F16 weight = broadcast<F16>(weights[g * KEYS + k]);
            for (int w = 0; w < W; ++w) total[g][w] = fused(weight, values[w], total[g][w]);
        }
    }
    for (int g = 0; g < G; ++g)
        for (int w = 0; w < W; ++w) store(sums + g * width + w * CHUNK, total[g][w]);
}

template <Codec C, int G>
inline void weigh(const float* weights, const uint8_t* value, int64_t row_bytes, int64_t width, int64_t keys, float* sums) {
    constexpr int64_t value_bytes = chunk_bytes<C> / CHUNK;
    int64_t d = 0;
    for (; d + WIDE * CHUNK <= width; d += WIDE * CHUNK)
        weigh_tile<C, G, WIDE>(weights, value + d * value_bytes, row_bytes, width, keys, sums + d);
    for (; d + CHUNK <= width; d += CHUNK) weigh_tile<C, G, 1>(weights, value + d * value_bytes, row_bytes, width, keys, sums + d);
    for (int64_t k = 0; d < width && k < keys; ++k) { // the last chunk of a head
        uint8_t bytes[chunk_bytes<C>] = {};
        memcpy(bytes, value + k * row_bytes + d * value_bytes, (width - d) * value_bytes);
        float values[CHUNK];
        store(values, decode<C>(bytes));
        for (int g = 0; g < G; ++g)
            for (int64_t i = d; i < width; ++i) sums[g * width + i] += weights[g * KEYS + k] * values[i - d];
    }
}

// Calls run(first head, constant number of heads) for the heads that share a key.
template <class Run> inline void by_heads(int64_t heads, Run run) {
    int64_t g = 0;
    for (; g + SHARING <= heads; g += SHARING) run(g, std::integral_constant<int, SHARING>{});
    if (SHARING > 3 && heads - g == 3) return run(g, std::integral_constant<int, 3>{});
    if (heads - g == 2) return run(g, std::integral_constant<int, 2>{});
    if (g < heads) run(g, std::integral_constant<int, 1>{});
}

// weights[0 .. keys] = e^(score - largest); returns their sum
inline float soften(float* scores, int64_t keys, float& largest) {
    float best = scores[0];
    int64_t i = 0;
    if (keys >= CHUNK) {
        F16 most = load<F16>(scores);
        for (i = CHUNK; i + CHUNK <= keys; i += CHUNK) most = maximum(most, load<F16>(scores + i));
        float lanes[CHUNK];
        store(lanes, most);
        for (float lane : lanes) best = lane > best ? lane : best;
    }
    for (; i < keys; ++i) best = scores[i] > best ? scores[i] : best;
    F16 total = zero<F16>();
    for (i = 0; i < keys; i += CHUNK) { // a row of scores is a multiple of CHUNK long
        const F16 weights = exponential(add(load<F16>(scores + i), broadcast<F16>(-best)));
        store(scores + i, weights);
        total = add(total, keys - i < CHUNK ? blend(int(keys - i), weights, zero<F16>()) : weights);
    }
    largest = best;
    float sum = 0;
    add_sums<1>(total, &sum);
    return sum;
}

inline Partial partial_at(const Attention& attention, float* memory) {
    return {memory, memory + attention.heads, memory + 2 * attention.heads};
}

template <Codec C>
void attend_with(const Attention& attention, const Pages& pages, int64_t row, int64_t from, const float* query, float* partial, float* scores) {
    const int64_t width = attention.head_width, sharing = attention.heads / attention.key_heads;
    const int64_t head_bytes = width * (chunk_bytes<C> / CHUNK), row_bytes = head_bytes * attention.key_heads;
    const int64_t end = pages.lengths[row] < from + KEYS ? pages.lengths[row] : from + KEYS;
    const int64_t* starts = pages.starts + pages.first[row];
    const Partial result = partial_at(attention, partial);
    // Calls run(memory of the first, how many, their place among the keys) for the tokens of each page.
    auto by_pages = [&](const void* cache, auto run) {
        for (int64_t at = from, keys; at < end; at += keys) {
            const int64_t within = at % pages.tokens, left = pages.tokens - within;
            keys = left < end - at ? left : end - at;
            const uint8_t* memory = static_cast<const uint8_t*>(cache) + (starts[at / pages.tokens] + within) * row_bytes;
            if (at + keys < end) { // the next page is somewhere else
                const uint8_t* next = static_cast<const uint8_t*>(cache) + starts[at / pages.tokens + 1] * row_bytes;
                for (int64_t byte = 0; byte < keys * row_bytes; byte += 64) __builtin_prefetch(next + byte, 0, 2);
            }
            run(memory, keys, at - from);
        }
    };
    by_pages(attention.keys, [&](const uint8_t* key, int64_t keys, int64_t at) {
        for (int64_t head = 0; head < attention.key_heads; ++head)
            by_heads(sharing, [&](int64_t g, auto count) {
                const int64_t first = head * sharing + g;
                score<C, decltype(count)::value>(query + first * width, key + head * head_bytes, row_bytes, width, keys,
                                                 attention.scale, scores + first * KEYS + at);
            });
    });
    for (int64_t head = 0; head < attention.heads; ++head)
        result.sum[head] = soften(scores + head * KEYS, end - from, result.largest[head]);
    memset(result.values, 0, attention.heads * width * sizeof(float));
    by_pages(attention.values, [&](const uint8_t* value, int64_t keys, int64_t at) {
        for (int64_t head = 0; head < attention.key_heads; ++head)
            by_heads(sharing, [&](int64_t g, auto count) {
                const int64_t first = head * sharing + g;
                weigh<C, decltype(count)::value>(scores + first * KEYS + at, value + head * head_bytes, row_bytes, width, keys,
                                                 result.values + first * width);
            });
    });
}

// `partial` = the share of keys from .. from + KEYS, or as many as there are; scratch [heads, KEYS]
inline void attend(const Attention& attention, const Pages& pages, int64_t row, int64_t from, const float* query, float* partial,
                   float* scratch) {
    if (attention.codec == Codec::bf16) attend_with<Codec::bf16>(attention, pages, row, from, query, partial, scratch);
    else attend_with<Codec::float32>(attention, pages, row, from, query, partial, scratch);
}

inline float exponential(float x) {
    float lanes[CHUNK];
    store(lanes, exponential(broadcast<F16>(x)));
    return lanes[0];
}

// total += partial, each relative to its own largest score
inline void merge(const Attention& attention, float* partial, float* total) {
    const Partial from = partial_at(attention, partial), to = partial_at(attention, total);
    const int64_t width = attention.head_width;
    for (int64_t head = 0; head < attention.heads; ++head) {
        const float largest = from.largest[head] > to.largest[head] ? from.largest[head] : to.largest[head];
        const float mine = exponential(from.largest[head] - largest), its = exponential(to.largest[head] - largest);
        to.largest[head] = largest;
        to.sum[head] = to.sum[head] * its + from.sum[head] * mine;
        for (int64_t i = head * width; i < (head + 1) * width; ++i) to.values[i] = to.values[i] * its + from.values[i] * mine;
    }
}

inline void finish(const Attention& attention, float* total, float* out) {
    const Partial from = partial_at(attention, total);
    const int64_t width = attention.head_width;
    for (int64_t head = 0; head < attention.heads; ++head) {
        const float factor = 1 / from.sum[head];
        for (int64_t i = head * width; i < (head + 1) * width; ++i) out[i] = from.values[i] * factor;
    }
}

// x [heads, width] *= its rotary embedding: the halves of a head are the coordinates that are turned; cosines, sines [width]
inline void rotate(const float* cosines, const float* sines, int64_t heads, int64_t width, float* x) {
    const int64_t half = width / 2;
    for (float* head = x; head != x + heads * width; head += width)
        for (int64_t i = 0; i < half; ++i) {
            const float low = head[i], high = head[i + half];
            head[i] = low * cosines[i] - high * sines[i];
            head[i + half] = high * cosines[i + half] + low * sines[i + half];
        }
}

// gate[i] = gate[i] * sigmoid(gate[i]) * up[i]
inline void gate_by_silu(const float* up, int64_t n, float* gate) {
    auto chunk = [](const float* gates, const float* ups, float* to) {
        const F16 x = load<F16>(gates), one = broadcast<F16>(1);
        const F16 below = add(one, exponential(multiply(x, broadcast<F16>(-1))));
        store(to, multiply(divide(x, below), load<F16>(ups)));
    };
    int64_t i = 0;
    for (; i + CHUNK <= n; i += CHUNK) chunk(gate + i, up + i, gate + i);
    if (i < n) {
        float gates[CHUNK] = {}, ups[CHUNK] = {};
        memcpy(gates, gate + i, (n - i) * sizeof(float));
        memcpy(ups, up + i, (n - i) * sizeof(float));
        chunk(gates, ups, gates);
        memcpy(gate + i, gates, (n - i) * sizeof(float));
    }
}

} // namespace
} // namespace deltaserve
