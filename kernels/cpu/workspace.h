// Memory that a calling thread keeps from call to call, and how many threads some work is worth.
#pragma once

#include "delta.h"
#include "threads.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace deltaserve {

constexpr double CYCLES_WORTH_A_THREAD = 15000; // waking a team costs about as much as this

inline int threads_for(double cycles) {
    return std::max(1, int(std::min<double>(most_threads(), cycles / CYCLES_WORTH_A_THREAD)));
}

inline int64_t aligned(int64_t floats) { return (floats + CHUNK - 1) / CHUNK * CHUNK; }

class Floats {
  public:
    Floats() = default;
    Floats(const Floats&) = delete;
    ~Floats() { std::free(memory); }
    float* reserve(int64_t floats) {
        if (floats > size) {
            std::free(memory);
            size = 0;
            const size_t bytes = (size_t(floats) * sizeof(float) + 63) / 64 * 64;
            memory = static_cast<float*>(std::aligned_alloc(64, bytes));
            if (!memory) throw std::bad_alloc();
            size = floats;
        }
        return memory;
    }

  private:
    float* memory = nullptr;
    int64_t size = 0;
};

} // namespace deltaserve
