// A loop over threads.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace corrsteer {

// Run body(i, worker) for every i in [0, n) on `threads` threads, of which `worker` is one. Each takes the next i when
// it is free. Bodies must not throw.
//
// With OpenMP, because torch does: its wheels bring the library under its usual name, so that this is the same one,
// and the same threads. Others would have to compete with torch's, which after each operation keep their processors
// busy for milliseconds, waiting for the next.
template <class Body>
void parallel_for([[maybe_unused]] int threads, int64_t n, const Body& body) {
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && n > 1)
    for (int64_t i = 0; i < n; i++) body(i, omp_get_thread_num());
#else
    for (int64_t i = 0; i < n; i++) body(i, 0);
#endif
}

}  // namespace corrsteer
