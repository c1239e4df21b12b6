// Threads and scratch memory.
//
// With OpenMP the regions run in the pool of the libgomp that torch has loaded, on as many threads as the caller asks for.
// Without it (macOS, -fopenmp refused) std::thread is used.  After a fork the worker threads of the parent do not exist and
// libgomp would wait for them for ever, so a forked child always runs on one thread and never enters the runtime.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace {

std::atomic<bool> in_forked_child{false};
#if defined(__unix__) || defined(__APPLE__)
__attribute__((constructor)) void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });
}
#endif

int usable_threads(int64_t requested, int64_t tasks) {
  if (in_forked_child.load(std::memory_order_relaxed)) return 1;
  return (int)std::max<int64_t>(1, std::min(requested, tasks));
}

// First exception of several threads: none may leave the thread it was thrown on, where it would end the process.
class Failure {
 public:
  template <class F> void guard(F f) noexcept {
    try {
      f();
    } catch (...) {
      if (!failed_.exchange(true)) first_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (failed_.load()) std::rethrow_exception(first_);
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr first_;
};

// Runs body(thread, threads) on `threads` threads (the runtime may grant fewer: body must use the second argument).  An
// exception of any of them is thrown here after all have ended.
template <class F> void run_threads(int threads, F body) {
  if (threads <= 1) {
    body(0, 1);
    return;
  }
  Failure failure;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  failure.guard([&] { body(omp_get_thread_num(), omp_get_num_threads()); });
#else
  std::vector<std::thread> pool;
  failure.guard([&] {
    for (int t = 1; t < threads; t++)
      pool.emplace_back([&, t] { failure.guard([&] { body(t, threads); }); });
  });
  failure.guard([&] { body(0, threads); });
  for (auto &t : pool) t.join();
#endif
  failure.rethrow();
}

// Tasks in any order on any thread: for work whose result does not depend on who does it.
template <class F> void parallel_dynamic(int64_t tasks, int threads, F body) {
  std::atomic<int64_t> next{0};
  run_threads(threads, [&](int, int) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(i);
  });
}

// Contiguous task ranges: body(thread, begin, end).  Sums kept per thread are then reproducible for a given thread count.
template <class F> void parallel_static(int64_t tasks, int threads, F body) {
  run_threads(threads, [&](int t, int n) { body(t, tasks * t / n, tasks * (t + 1) / n); });
}

// Aligned memory released at the end of a call.
template <class T> class Buffer {
 public:
  explicit Buffer(size_t count) {
    const size_t bytes = (count * sizeof(T) + 64) / 64 * 64;
    data_ = (T *)aligned_alloc(64, bytes);
    if (!data_) throw std::bad_alloc();
  }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  ~Buffer() { free(data_); }
  T *get() const { return data_; }
  T &operator[](size_t i) const { return data_[i]; }

 private:
  T *data_;
};

// Scratch of one thread, kept between calls: fresh pages in every call would cost more than short sequences compute.
class Scratch {
 public:
  void reset(size_t bytes) {
    if (bytes > capacity_) {
      free(base_);
      base_ = (char *)aligned_alloc(64, (bytes + 4095) / 4096 * 4096);
      if (!base_) {
        capacity_ = 0;
        throw std::bad_alloc();
      }
      capacity_ = (bytes + 4095) / 4096 * 4096;
    }
    used_ = 0;
  }
  template <class T> T *take(size_t count) {
    T *p = (T *)(base_ + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  static Scratch &mine() {
    thread_local Scratch scratch;
    return scratch;
  }
  ~Scratch() { free(base_); }

 private:
  char *base_ = nullptr;
  size_t capacity_ = 0, used_ = 0;
};

}  // namespace
