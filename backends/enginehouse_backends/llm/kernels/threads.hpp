// A team of threads that runs a list of stages together. The chunks of a stage are claimed one by one, and a stage
// is over when its chunks are done, not when every thread has come by: one that the system has put aside holds up
// no more than the chunk that it has claimed, and nobody if it has none. Spinning is bounded.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
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

template <class Done>
inline void wait_until(Done done) {
  for (int spins = 0; !done(); ++spins) spins < kSpins ? relax() : (void)sched_yield();
}

class Team {
 public:
  explicit Team(int num_threads) : size_(num_threads), runs_(size_t(num_threads) + 1) {
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~Team() {
    stop_ = true;
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& worker : workers_) worker.join();
  }
  int size() const { return size_; }

  // Does stages 0 … count - 1 after each other on the first `num_threads` threads; returns when all are done.
  // Job is copied: `long chunks(long stage) const`, `void work(long stage, long chunk) const`. Threads that come
  // late may still ask for `chunks` when this has returned, until `forget`.
  template <class Job>
  void run(int num_threads, long count, const Job& job) {
    if (num_threads <= 1 || size_ == 1) {
      for (long stage = 0; stage < count; ++stage)
        for (long chunk = 0, all = job.chunks(stage); chunk < all; ++chunk) job.work(stage, chunk);
      return;
    }
    static_assert(sizeof(Job) <= sizeof(Run::job) && std::is_trivially_copyable_v<Job>);
    Run& run = unused_run();
    if (run.capacity < count) run.stages = std::make_unique<Stage[]>(size_t(run.capacity = count));
    for (long i = 0; i < count; ++i) {
      run.stages[i].claimed.store(0, std::memory_order_relaxed);
      run.stages[i].done.store(0, std::memory_order_relaxed);
    }
    run.count = count;
    run.threads = num_threads;
    new (run.job) Job(job);
    run.body = [](Run& r) { take_part(r, *std::launder(reinterpret_cast<const Job*>(r.job))); };
    current_.store(&run);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    run.body(run);
  }

  // Returns when no thread looks at a job any more that has been run. Nothing may be running.
  void forget() {
    current_.store(nullptr);
    for (Run& run : runs_) wait_until([&] { return run.users.load() == 0; });
  }

 private:
  struct alignas(64) Stage {
    std::atomic<long> claimed{0}, done{0};
  };
  // What threads share of one run. Each late thread keeps one from being used again: there are enough of them.
  struct Run {
    alignas(64) std::atomic<int> users{0};
    std::unique_ptr<Stage[]> stages;
    long capacity = 0, count = 0;
    int threads = 0;
    void (*body)(Run&) = nullptr;
    alignas(64) unsigned char job[256];
  };

  template <class Job>
  static void take_part(Run& run, const Job& job) {
    for (long i = 0; i < run.count; ++i) {
      Stage& stage = run.stages[i];
      const long chunks = job.chunks(i);
      for (;;) {
        const long chunk = stage.claimed.fetch_add(1, std::memory_order_relaxed);
        if (chunk >= chunks) break;
        job.work(i, chunk);
        stage.done.fetch_add(1, std::memory_order_acq_rel);
      }
      wait_until([&] { return stage.done.load(std::memory_order_acquire) >= chunks; });
    }
  }

  Run& unused_run() {
    const Run* last = current_.load();
    for (;;) {
      for (Run& run : runs_)
        if (&run != last && run.users.load() == 0) return run;
      sched_yield();
    }
  }

  void work(int index) {
    uint32_t seen = 0;
    for (;;) {
      for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen && spins < kSpins; ++spins) relax();
      epoch_.wait(seen, std::memory_order_acquire);
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_) return;
      Run* run = current_.load();
      if (!run) continue;
      run->users.fetch_add(1);
      // looked at again: between the two it may have been taken for another run
      if (current_.load() == run && index < run->threads) run->body(*run);
      run->users.fetch_sub(1);
    }
  }

  const int size_;
  std::vector<Run> runs_;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<Run*> current_{nullptr};
  std::vector<std::thread> workers_;
};

}  // namespace eh
