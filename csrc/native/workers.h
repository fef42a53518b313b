// Threads that share the tasks of a call.
#pragma once

#include <cstdint>
#include <functional>

namespace corrsteer {

// Run task(number, worker) for every number in [0, tasks), on up to `threads` threads, this one among them; `worker`
// is in [0, threads). Tasks are taken in order as threads become free, and must not throw. When this returns, all of
// them are done and what they wrote can be read.
void share(int threads, int64_t tasks, const std::function<void(int64_t, int)>& task);

}  // namespace corrsteer
