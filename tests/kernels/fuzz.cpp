// Random deltas, batches and malformed segment tables through the C interface, for the sanitizers (`make sanitize`). Every
// buffer has exactly its size, so that the address sanitizer sees a read or write one past it; every instruction set must
// give what the portable code gives. Values themselves are tested against the oracle in test_operations.py.
#include "../../kernels/cpu/decoder.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

using namespace deltaserve;

extern "C" {
const void* deltaserve_operations(const char* name);
int32_t deltaserve_linear(const void*, const Layer*, int64_t, void*, int64_t, int64_t, int64_t, int32_t, void*, int64_t, int64_t,
                          int64_t, int32_t, const int32_t*, const int32_t*, int64_t);
int32_t deltaserve_embedding(const void*, void*, int64_t, int64_t, int64_t, int32_t, const int64_t*, const Delta* const*,
                             int64_t, const int32_t*, const int32_t*, int64_t);
int32_t deltaserve_rms_norm(const void*, float*, const float*, int64_t, int64_t, int64_t, const float*, int64_t, const int64_t*, float, float);
int32_t deltaserve_attend(const void*, const Attention*, const Pages*, const float*, float*, int64_t);
int32_t deltaserve_decode(const void*, const Block*, int64_t, const Step*, float*, int64_t);
int32_t deltaserve_swap(const void*, const Swap*, int64_t, int32_t);
int32_t deltaserve_uniform_columns(uint32_t, uint32_t, int64_t, int64_t, int64_t, int32_t*);
int32_t deltaserve_weighted_columns(const int64_t*, uint32_t, uint32_t, int64_t, int64_t, int64_t, int32_t*, float*);
int32_t deltaserve_keep_columns(const int32_t*, int64_t, int64_t, int64_t, void*);
}

namespace {

std::mt19937 rng;

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }
template <class T> T pick(std::initializer_list<T> from) { return from.begin()[between(0, int64_t(from.size()) - 1)]; }

std::vector<float> random_floats(int64_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> values(n);
    for (float& value : values) value = normal(rng);
    return values;
}

// A delta and all that it points to.
struct Made {
    std::vector<std::vector<uint8_t>> bytes;
    std::vector<Part> parts;
    Delta delta;

    template <class T> const T* keep(const std::vector<T>& values) {
        bytes.emplace_back(values.size() * sizeof(T));
        if (!values.empty()) std::memcpy(bytes.back().data(), values.data(), bytes.back().size());
        return reinterpret_cast<const T*>(bytes.back().data());
    }

    Codes codes(int64_t lines, int64_t length, Codec codec, int64_t group) {
        constexpr int bits[] = {32, 16, 8, 4, 2, 1};
        const int64_t padded = (length + CHUNK - 1) / CHUNK * CHUNK;
        Codes made{nullptr, nullptr, length, padded * bits[int(codec)] / 8, group, codec, 0};
        std::vector<uint8_t> data(lines * made.line_bytes);
        for (uint8_t& byte : data) byte = uint8_t(between(0, 255));
        if (codec == Codec::float32) {
            const std::vector<float> values = random_floats(lines * padded);
            if (!data.empty()) std::memcpy(data.data(), values.data(), data.size());
        }
        if (codec == Codec::bf16) // exponents near 1
            for (size_t i = 1; i < data.size(); i += 2) data[i] = uint8_t(0x3f | (data[i] & 0x80));
        made.data = keep(data);
        if (codec != Codec::float32 && codec != Codec::bf16)
            made.scales = keep(std::vector<uint16_t>((lines * length + group - 1) / group, 0x3f80));
        return made;
    }

    Part part(Kind kind, int64_t rows, int64_t width) {
        const Codec codec = Codec(between(0, 5));
        const int64_t group = pick<int64_t>({16, 17, 48, 64, 1000});
        Part made{};
        made.kind = kind;
        made.gain = 1;
        if (kind == Kind::sparse) {
            made.block = pick({1, 4, 8, 16, 32, 64});
            const int64_t blocks = (rows + made.block - 1) / made.block;
            made.kept = between(1, width);
            made.wide_columns = between(0, 4) == 0;
            std::vector<int32_t> columns;
            for (int64_t b = 0; b < blocks; ++b)
                for (int64_t k = 0; k < made.kept; ++k) columns.push_back(int32_t(k * width / made.kept));
            columns.resize(columns.size() + CHUNK);
            if (made.wide_columns) made.columns = keep(columns);
            else made.columns = keep(std::vector<uint16_t>(columns.begin(), columns.end()));
            if (between(0, 1)) made.factors = keep(random_floats(width));
            const bool fits = group % made.block == 0 || group % CHUNK == 0;
            made.a = codes(blocks, made.kept * made.block, made.wide_columns ? Codec::float32 : codec, fits ? group : 64);
        } else if (kind == Kind::low_rank) {
            made.kept = between(1, 9);
            made.a = codes(made.kept, width, codec, group);
            made.b = codes(made.kept, rows, codec, group); // column after column, a scale for each row or for some chunks of them
            made.b.group = pick({1, 16, 48});
            if (made.b.scales) made.b.scales = keep(std::vector<uint16_t>((rows + CHUNK - 1) / CHUNK * CHUNK, 0x3f80));
        } else if (kind == Kind::dense) {
            made.a = codes(rows, width, codec, group);
        } else {
            std::vector<int64_t> ids;
            for (int64_t row = 0; row < rows; ++row)
                if (between(0, 2) == 0) ids.push_back(row);
            made.kept = int64_t(ids.size());
            made.ids = keep(ids);
            made.a = codes(made.kept, width, codec, group);
            if (between(0, 1)) made.mean = keep(random_floats(width));
            made.mean_rows = rows - between(0, rows);
        }
        return made;
    }

    Made(int64_t rows, int64_t width, int64_t count, bool sparse_only) {
        bytes.reserve(64);
        for (int64_t p = 0; p < count; ++p) parts.push_back(part(sparse_only ? Kind::sparse : Kind(between(0, 3)), rows, width));
        delta = {rows, width, parts.data(), count, pick({0.0, 1e6})}; // 1e6: as many threads as there are
    }
};

// Layers with one input: some with a weight of their own, some whose y is given, all with the same bank.
struct Stack {
    std::vector<std::vector<uint8_t>> weights;
    std::vector<std::vector<float>> floats;
    std::vector<const float*> biases;
    std::vector<Layer> layers;

    Stack(int64_t count, int64_t rows, int64_t width, const std::vector<const Delta*>& bank) {
        floats.reserve(64);
        const auto keep = [this](std::vector<float> values) { return floats.emplace_back(std::move(values)).data(); };
        for (size_t slot = 0; slot < bank.size(); ++slot) biases.push_back(between(0, 1) ? keep(random_floats(rows)) : nullptr);
        for (int64_t i = 0; i < count; ++i) {
            const Codec codec = pick({Codec::float32, Codec::bf16, Codec::int8});
            weights.emplace_back(rows * width * (codec == Codec::float32 ? 4 : codec == Codec::bf16 ? 2 : 1));
            std::vector<uint8_t>& weight = weights.back();
            for (size_t b = 0; b < weight.size(); ++b) weight[b] = uint8_t(between(0, 255));
            if (codec == Codec::float32) std::memcpy(weight.data(), random_floats(rows * width).data(), weight.size());
            if (codec == Codec::bf16) // exponents near 1
                for (size_t b = 1; b < weight.size(); b += 2) weight[b] = uint8_t(0x3f | (weight[b] & 0x80));
            const float* bias = between(0, 1) ? keep(random_floats(rows)) : nullptr;
            const float* scales = codec == Codec::int8 ? keep(random_floats(rows)) : nullptr;
            layers.push_back({between(0, 4) ? weight.data() : nullptr, scales, bias, bank.data(), between(0, 1) ? biases.data() : nullptr,
                              int64_t(bank.size()), rows, width, codec, 0});
        }
    }
};

struct Batch {
    std::vector<int32_t> offsets{0}, slots;
    int64_t rows() const { return offsets.back(); }
    Batch(int64_t runs, int64_t bank) {
        for (int64_t i = 0; i < runs; ++i) {
            offsets.push_back(offsets.back() + int32_t(between(0, 20)));
            slots.push_back(int32_t(between(-1, bank - 1)));
        }
    }
    void spoil() {
        int32_t& entry = between(0, 1) ? offsets[between(0, int64_t(offsets.size()) - 1)] : slots[between(0, int64_t(slots.size()) - 1)];
        entry = pick<int32_t>({INT32_MIN, -2, -1, 0, 1, 1000, INT32_MAX});
    }
};

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "fuzz: %s\n", what);
    std::exit(1);
}

void require_close(const std::vector<float>& got, const std::vector<float>& expected) {
    double error = 0, size = 0;
    for (size_t i = 0; i < got.size(); ++i) {
        error += std::pow(double(got[i]) - expected[i], 2);
        size += std::pow(double(expected[i]), 2);
    }
    require(error <= 1e-9 * size, "an instruction set disagrees with the portable code");
}

void round_of(const std::vector<const void*>& sets) {
    const int64_t rows = between(1, 200), width = between(1, 150), count = between(1, 4);
    std::vector<std::unique_ptr<Made>> made;
    std::vector<const Delta*> bank;
    for (int64_t i = 0; i < count; ++i) {
        made.push_back(std::make_unique<Made>(rows, width, between(1, 3), false));
        bank.push_back(between(0, 4) ? &made.back()->delta : nullptr);
    }
    Batch batch(between(1, 6), count);
    const int64_t tokens = batch.rows(), layers = between(1, 3);
    if (between(0, 3) == 0) batch.spoil();
    const Stack stack(layers, rows, width, bank);
    const std::vector<float> x = random_floats(tokens * width);
    std::vector<int64_t> ids(tokens);
    for (int64_t& id : ids) id = between(0, rows - (between(0, 50) ? 1 : 0)); // seldom one too far

    std::vector<float> first_y, first_embedding;
    for (const void* set : sets) {
        std::vector<float> y(layers * tokens * rows), embedding(tokens * width), input = x;
        const int32_t segments = int32_t(batch.slots.size());
        deltaserve_linear(set, stack.layers.data(), layers, y.data(), rows, tokens, rows, 0, input.data(), width, tokens, width,
                          0, batch.offsets.data(), batch.slots.data(), segments);
        deltaserve_embedding(set, embedding.data(), width, tokens, width, 0, ids.data(), bank.data(), count,
                             batch.offsets.data(), batch.slots.data(), segments);
        if (set == sets[0]) {
            first_y = y;
            first_embedding = embedding;
        }
        require_close(y, first_y);
        require_close(embedding, first_embedding);
        std::vector<int64_t> places(tokens);
        for (int64_t& place : places) place = between(0, 50) ? between(0, 2) : 3; // seldom one too far
        std::vector<float> norm(tokens * width), table = random_floats(3 * width);
        deltaserve_rms_norm(set, norm.data(), input.data(), tokens, 1, width, table.data(), 3, places.data(), 1e-5f, 0);
        for (int32_t dtype : {1, 2}) { // bf16 and float16: what the bytes mean does not matter here
            std::vector<uint16_t> half_y(layers * tokens * rows), half_x(tokens * width, 0x3c00);
            deltaserve_linear(set, stack.layers.data(), layers, half_y.data(), rows, tokens, rows, dtype, half_x.data(), width,
                              tokens, width, dtype, batch.offsets.data(), batch.slots.data(), segments);
        }
        const Made sparse(rows, width, 1, true), other(rows, width, 1, true);
        std::vector<float> weight = random_floats(2 * rows * width), saved(rows * sparse.parts[0].kept);
        std::vector<float> other_saved(rows * other.parts[0].kept);
        const std::vector<float> original = weight;
        const Matrix low{weight.data(), width, rows, width, Dtype::float32, 0};
        const Matrix high{weight.data() + rows * width, width, rows, width, Dtype::float32, 0};
        const Swap swaps[] = {{low, &sparse.delta, saved.data()}, {high, &other.delta, other_saved.data()}};
        require(!deltaserve_swap(set, swaps, 2, 1), "swap in");
        require(!deltaserve_swap(set, swaps, 2, 0), "swap out");
        require(!std::memcmp(weight.data(), original.data(), weight.size() * sizeof(float)), "a swap left a trace");
    }
}

// Requests of some keys each in a cache of exactly their pages, and now and then a table that is wrong.
struct Cached {
    int64_t tokens = pick<int64_t>({1, 3, 16, 200});
    std::vector<int64_t> starts, first, lengths, writes;
    explicit Cached(int64_t rows) {
        for (int64_t row = 0; row < rows; ++row) {
            first.push_back(int64_t(starts.size()));
            lengths.push_back(between(1, pick<int64_t>({4, 40, 300})));
            for (int64_t page = 0; page < (lengths.back() + tokens - 1) / tokens; ++page) starts.push_back(int64_t(starts.size()) * tokens);
            writes.push_back(starts[first.back() + (lengths.back() - 1) / tokens] + (lengths.back() - 1) % tokens);
        }
    }
    int64_t rows() const { return int64_t(starts.size()) * tokens; }
    void spoil() {
        std::vector<int64_t>& table = *pick({&starts, &first, &lengths, &writes});
        table[between(0, int64_t(table.size()) - 1)] = pick<int64_t>({INT64_MIN, -1, 0, 1, rows(), INT64_MAX});
    }
    Pages pages() const { return {starts.data(), int64_t(starts.size()), first.data(), lengths.data(), tokens}; }
};

void attention_round(const std::vector<const void*>& sets) {
    const int64_t rows = between(1, 9), key_heads = between(1, 3), heads = key_heads * between(1, 5), width = 2 * between(1, 40);
    Cached cached(rows);
    if (between(0, 3) == 0) cached.spoil();
    const Pages pages = cached.pages();
    const std::vector<float> keys = random_floats(cached.rows() * key_heads * width), values = random_floats(keys.size());
    const std::vector<uint16_t> half(keys.size(), 0x3f80);
    const std::vector<float> queries = random_floats(rows * heads * width);
    std::vector<float> expected;
    for (const void* set : sets) {
        std::vector<float> out(queries.size());
        Attention attention{keys.data(), values.data(), cached.rows(), heads, key_heads, width, 0.1f, Codec::float32};
        deltaserve_attend(set, &attention, &pages, queries.data(), out.data(), rows);
        if (expected.empty()) expected = out;
        require_close(out, expected);
        attention.keys = attention.values = half.data();
        attention.codec = Codec::bf16;
        deltaserve_attend(set, &attention, &pages, queries.data(), out.data(), rows);
    }

    const int64_t hidden = between(1, 70), inner = between(1, 70), slots = 2;
    const std::vector<const Delta*> none(slots, nullptr);
    const auto layer = [&](int64_t out, int64_t in, const std::vector<float>& weight) {
        return Layer{weight.data(), nullptr, nullptr, none.data(), nullptr, slots, out, in, Codec::float32, 0};
    };
    const int64_t q = heads * width, k = key_heads * width;
    const std::vector<float> weights[] = {random_floats(q * hidden), random_floats(k * hidden), random_floats(k * hidden), random_floats(hidden * q),
                                          random_floats(inner * hidden), random_floats(inner * hidden), random_floats(hidden * inner)};
    const Layer input[] = {layer(q, hidden, weights[0]), layer(k, hidden, weights[1]), layer(k, hidden, weights[2])};
    const Layer output = layer(hidden, q, weights[3]), down = layer(hidden, inner, weights[6]);
    const Layer gate_and_up[] = {layer(inner, hidden, weights[4]), layer(inner, hidden, weights[5])};
    const std::vector<float> table = random_floats((slots + 1) * hidden), turns = random_floats(2 * rows * width), x = random_floats(rows * hidden);
    const Norm norm{table.data(), table.data(), slots + 1, 1e-5f, 0};
    const Block block{norm, norm, input, &output, gate_and_up, &down};
    std::vector<int64_t> places(rows);
    for (int64_t& place : places) place = between(0, slots + (between(0, 50) ? 0 : 1)); // seldom one too far
    expected.clear();
    for (const void* set : sets) {
        std::vector<float> own_keys = keys, own_values = values, y = x;
        void *key_address = own_keys.data(), *value_address = own_values.data();
        const Attention attention{nullptr, nullptr, cached.rows(), heads, key_heads, width, 0.1f, Codec::float32};
        const Step step{attention, &key_address, &value_address, pages, cached.writes.data(), turns.data(), turns.data() + rows * width,
                        places.data(), {nullptr, nullptr, 0}};
        deltaserve_decode(set, &block, 1, &step, y.data(), rows);
        if (expected.empty()) expected = y;
        require_close(y, expected);
    }
}

// Both draws give columns that the kernels accept; of others the first that is out of order is found.
void columns_round() {
    const int64_t width = between(1, 300), kept = between(1, width), blocks = between(1, 9);
    std::vector<int64_t> weights(width);
    for (int64_t& weight : weights) weight = pick({int64_t(1), between(1, 40), ((int64_t(1) << 62) - 1) / (width * kept)});
    std::vector<int32_t> columns(blocks * kept);
    std::vector<uint16_t> laid_out(blocks * kept);
    std::vector<float> factors(width);
    const auto refused = [&] { return deltaserve_keep_columns(columns.data(), blocks, width, kept, laid_out.data()); };
    const uint32_t key = rng(), second_key = rng();
    bool failed = deltaserve_uniform_columns(key, second_key, blocks, width, kept, columns.data()) || refused();
    failed |= deltaserve_weighted_columns(weights.data(), key, second_key, blocks, width, kept, columns.data(), factors.data()) ||
              refused();
    columns[between(0, blocks * kept - 1)] = pick({-1, int32_t(width)});
    if (failed || !refused()) {
        std::printf("columns of width %lld, %lld kept, are wrong\n", (long long)width, (long long)kept);
        std::exit(1);
    }
}

} // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
    std::vector<const void*> sets;
    for (const char* name : {"portable", "neon", "avx2", "avx512"})
        if (const void* set = deltaserve_operations(name)) sets.push_back(set);
    for (int round = 0; round < rounds; ++round) {
        rng.seed(uint32_t(round));
        round_of(sets);
        attention_round(sets);
        columns_round();
    }
    std::printf("%d rounds, %zu instruction sets\n", rounds, sets.size());
}
