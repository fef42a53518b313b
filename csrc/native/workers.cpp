#include "workers.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace corrsteer {
namespace {

// Threads of our own rather than OpenMP's: torch brings its own copy of an OpenMP library, and two of them in one
// process keep each other's processors busy with waiting.
class Pool {
public:
    void run(int threads, int64_t tasks, const std::function<void(int64_t, int)>& task) {
        {
            std::unique_lock lock(mutex_);
            while (started_ < threads - 1) {
                try {
                    std::thread([this, worker = started_ + 1] { serve(worker); }).detach();
                } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
                    break;
                }
                started_++;
            }
            task_ = &task, tasks_ = tasks, next_ = 0;
            taking_part_ = threads - 1 < started_ ? threads - 1 : started_;
            working_ = taking_part_;
            call_++;
        }
        begin_.notify_all();
        work(0);
        std::unique_lock lock(mutex_);
        end_.wait(lock, [this] { return working_ == 0; });
    }

private:
    void serve(int worker) {
        uint64_t seen = 0;
        std::unique_lock lock(mutex_);
        for (;;) {
            begin_.wait(lock, [&] { return call_ != seen && worker <= taking_part_; });
            seen = call_;
            lock.unlock();
            work(worker);
            lock.lock();
            if (--working_ == 0) end_.notify_one();
        }
    }

    void work(int worker) {
        for (int64_t at; (at = next_++) < tasks_;) (*task_)(at, worker);
    }

    std::mutex mutex_;
    std::condition_variable begin_, end_;
    const std::function<void(int64_t, int)>* task_ = nullptr;
    int64_t tasks_ = 0;
    std::atomic<int64_t> next_{0};
    uint64_t call_ = 0;
    int started_ = 0, taking_part_ = 0, working_ = 0;
};

Pool* pool = nullptr;  // never destroyed, as its threads are never joined
std::mutex busy;       // held by the call that uses the pool

// A fork takes the thread that forks along and no other, so a child starts with a pool of its own. The lock is held
// across the fork, so that it is not in another thread's hands on the other side.
[[maybe_unused]] void before_fork() { busy.lock(); }
[[maybe_unused]] void after_fork_in_parent() { busy.unlock(); }
[[maybe_unused]] void after_fork_in_child() {
    pool = nullptr;
    busy.unlock();
}

}  // namespace

void share(int threads, int64_t tasks, const std::function<void(int64_t, int)>& task) {
    if (threads > tasks) threads = int(tasks);
    // Where another call is using the pool, there is a thread of Python's for each call already.
    std::unique_lock lock(busy, std::defer_lock);
    if (threads < 2 || !lock.try_lock()) {
        for (int64_t at = 0; at < tasks; at++) task(at, 0);
        return;
    }
    if (!pool) {
#if defined(__unix__) || defined(__APPLE__)
        static const int registered = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
        (void)registered;
#endif
        pool = new Pool;
    }
    pool->run(threads, tasks, task);
}

}  // namespace corrsteer
