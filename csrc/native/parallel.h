// Threads that share the tasks of a call.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace corrsteer {

// Run task(number, worker) for every number in [0, tasks) on `threads` threads, of which `worker` is one. Threads take
// the next task when they are free. Tasks must not throw.
//
// With OpenMP, because torch does: its wheels bring the library under its usual name, so that this is the same one,
// and the same threads. Others would have to compete with torch's, which after each operation keep their processors
// busy for milliseconds, waiting for the next.
template <class Task>
void share([[maybe_unused]] int threads, int64_t tasks, const Task& task) {
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && tasks > 1)
    for (int64_t at = 0; at < tasks; at++) task(at, omp_get_thread_num());
#else
    for (int64_t at = 0; at < tasks; at++) task(at, 0);
#endif
}

}  // namespace corrsteer
