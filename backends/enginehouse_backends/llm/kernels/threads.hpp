// A team of threads that runs a list of stages together: chunks of a stage are claimed one by one, so that a
// thread that the system has put aside holds up no more than its own chunk. Spinning is bounded.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace eh {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kSpins = 1500;  // some tens of microseconds, then others may have the core

class Team {
 public:
  explicit Team(int num_threads) : size_(num_threads) {
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~Team() {
    stop_ = true;
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& worker : workers_) worker.join();
  }
  int size() const { return size_; }

  // Calls job(thread) on the first `num_threads` threads, this one being 0; returns when all are done.
  template <class Job>
  void run(int num_threads, Job& job) {
    active_ = num_threads < size_ ? num_threads : size_;
    if (active_ == 1) return job(0);
    job_ = [](void* self, int thread) { (*static_cast<Job*>(self))(thread); };
    argument_ = &job;
    arrived_ = 0;
    running_.store(active_ - 1);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    job(0);
    for (int spins = 0; running_.load(std::memory_order_acquire) != 0; ++spins)
      spins < kSpins ? relax() : (void)sched_yield();
  }

  // All active threads of the running job meet here.
  void meet() {
    if (active_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == active_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins)
      spins < kSpins ? relax() : (void)sched_yield();
  }

 private:
  void work(int index) {
    uint32_t seen = 0;
    for (;;) {
      for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen && spins < kSpins; ++spins) relax();
      epoch_.wait(seen, std::memory_order_acquire);
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_) return;
      if (index >= active_) continue;
      job_(argument_, index);
      running_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  const int size_;
  int active_ = 1;
  void (*job_)(void*, int) = nullptr;
  void* argument_ = nullptr;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int> running_{0};
  std::vector<std::thread> workers_;
};

}  // namespace eh
