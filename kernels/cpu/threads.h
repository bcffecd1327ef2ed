// Share work over threads: OpenMP, in the runtime that torch has already loaded, so that both use one pool. The thread
// sanitizer does not understand that runtime; under it (DELTASERVE_STD_THREADS) the same ranges run on standard threads.
#pragma once

#include <cstdint>

#if defined(DELTASERVE_STD_THREADS)
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace deltaserve {

inline int most_threads() {
#if defined(DELTASERVE_STD_THREADS)
    return 4;
#elif defined(_OPENMP)
    return omp_get_max_threads(); // what torch.set_num_threads has set for the calling thread
#else
    return 1;
#endif
}

// body(begin, end, thread) over [0, items) in one contiguous range a thread; must not throw.
template <class Body> void share(int threads, int64_t items, const Body& body) {
    if (threads > items) threads = int(items);
    if (threads <= 1) {
        if (items) body(int64_t(0), items, 0);
        return;
    }
#if defined(DELTASERVE_STD_THREADS)
    std::vector<std::thread> team;
    for (int i = 0; i < threads; ++i)
        team.emplace_back([&, i] { body(items * i / threads, items * (i + 1) / threads, i); });
    for (auto& member : team) member.join();
#elif defined(_OPENMP)
#pragma omp parallel num_threads(threads)
    {
        const int64_t team = omp_get_num_threads(), i = omp_get_thread_num();
        body(items * i / team, items * (i + 1) / team, int(i));
    }
#endif
}

} // namespace deltaserve
