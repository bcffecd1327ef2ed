// See columns.h. Integer arithmetic throughout: the same columns on every machine.
#include "columns.h"

#include <algorithm>
#include <array>
#include <vector>

namespace deltaserve {
namespace {

constexpr uint32_t UNIFORM = 0, WEIGHTED = 1; // the third word of a draw's counter
constexpr int64_t PRODUCT_LIMIT = int64_t(1) << 62;

// Philox4x32-10 at counter (a, b, c, 0)
std::array<uint32_t, 4> philox(uint32_t a, uint32_t b, uint32_t c, uint32_t key, uint32_t second_key) {
    uint32_t d = 0;
    for (int round = 0; round < 10; ++round, key += 0x9E3779B9u, second_key += 0xBB67AE85u) {
        const uint64_t left = uint64_t(a) * 0xD2511F53u, right = uint64_t(c) * 0xCD9E8D57u;
        a = uint32_t(right >> 32) ^ b ^ key;
        b = uint32_t(right);
        c = uint32_t(left >> 32) ^ d ^ second_key;
        d = uint32_t(left);
    }
    return {a, b, c, d};
}

// Takes the columns whose probability would reach 1 out of `drawn` (all of them, ascending): what is left is lighter each
// time, so more may follow.
std::vector<int32_t> certain_columns(const int64_t* weights, int64_t kept, int64_t total, std::vector<int32_t>& drawn) {
    std::vector<int32_t> certain;
    for (bool found = true; found && !drawn.empty();) {
        const int64_t rest = kept - int64_t(certain.size());
        const auto lighter = [&](int32_t j) { return weights[j] * rest < total; };
        const auto heavy = rest ? std::stable_partition(drawn.begin(), drawn.end(), lighter) : drawn.end();
        found = heavy != drawn.end();
        certain.insert(certain.end(), heavy, drawn.end());
        for (auto j = heavy; j != drawn.end(); ++j) total -= weights[*j];
        drawn.erase(heavy, drawn.end());
    }
    std::sort(certain.begin(), certain.end());
    return certain;
}

// The ends of columns on a line, and a guide: where the first end beyond each of some marks is.
class Line {
  public:
    Line(const int64_t* weights, const std::vector<int32_t>& columns) {
        for (int32_t j : columns) ends.push_back(length += weights[j]);
        while (length >> shift > 2 * int64_t(columns.size())) ++shift;
        for (size_t i = 0; guide.size() <= size_t(length >> shift) + 1; guide.push_back(i))
            while (i + 1 < ends.size() && ends[i] <= int64_t(guide.size()) << shift) ++i;
    }
    // which column `point` < length falls on
    size_t at(int64_t point) const {
        const auto from = ends.begin() + guide[point >> shift], to = ends.begin() + guide[(point >> shift) + 1];
        return std::upper_bound(from, to, point) - ends.begin();
    }
    int64_t length = 0;

  private:
    std::vector<int64_t> ends;
    std::vector<size_t> guide;
    int shift = 0;
};

} // namespace

void uniform_columns(uint32_t key, uint32_t second_key, int64_t blocks, int64_t width, int64_t kept, int32_t* columns) {
    std::vector<int64_t> edges(kept + 1);
    for (int64_t i = 0; i <= kept; ++i) edges[i] = i * width / kept;
    for (int64_t b = 0; b < blocks; ++b, columns += kept)
        for (int64_t i = 0; i < kept; i += 4) {
            const auto words = philox(uint32_t(i / 4), uint32_t(b), UNIFORM, key, second_key);
            for (int64_t j = i; j < std::min(i + 4, kept); ++j)
                columns[j] = int32_t(edges[j] + (int64_t(words[j - i]) * (edges[j + 1] - edges[j]) >> 32));
        }
}

bool weighted_columns(const int64_t* weights, uint32_t key, uint32_t second_key, int64_t blocks, int64_t width, int64_t kept,
                      int32_t* columns, float* factors) {
    int64_t total = 0;
    std::vector<int32_t> drawn(width);
    for (int64_t j = 0; j < width; ++j) {
        if (weights[j] < 1 || weights[j] > (PRODUCT_LIMIT - 1) / kept - total) return false;
        total += weights[j];
        drawn[j] = int32_t(j);
    }
    const std::vector<int32_t> certain = certain_columns(weights, kept, total, drawn);
    const int64_t rest = kept - int64_t(certain.size());
    std::fill(factors, factors + width, 1.0f);
    if (!rest) {
        for (int64_t b = 0; b < blocks; ++b) std::copy(certain.begin(), certain.end(), columns + b * kept);
        return true;
    }
    const Line line(weights, drawn);
    total = line.length;
    for (int32_t j : drawn) factors[j] = float(double(total) / double(rest * weights[j]));
    const int64_t step = total / rest, step_left = total % rest;
    std::vector<int32_t> hit(rest);
    for (int64_t b = 0; b < blocks; ++b) {
        const auto words = philox(0, uint32_t(b), WEIGHTED, key, second_key);
        const uint64_t r = (uint64_t(words[0]) << 32 | words[1]) % uint64_t(total);
        // the points (r + i * total) / rest, with one division a block
        int64_t point = int64_t(r) / rest, left = int64_t(r) % rest;
        for (int64_t i = 0; i < rest; ++i) {
            hit[i] = drawn[line.at(point)];
            point += step;
            left += step_left;
            if (left >= rest) {
                left -= rest;
                ++point;
            }
        }
        std::merge(certain.begin(), certain.end(), hit.begin(), hit.end(), columns + b * kept);
    }
    return true;
}

} // namespace deltaserve
