// A thread pool that serves one caller through many short loops. OpenMP synchronises all its threads at the start and
// end of each loop. A late thread (another program holds its processor, or it woke on the caller's own) then delays the
// others by milliseconds in every loop. Here threads claim items one by one, so a late thread simply does less of the
// work.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastalign {

class ThreadPool {
 public:
  // Calls lead(pool) on this thread; threads - 1 other threads help with its loops.
  template <typename F> static void run(int threads, const F& lead) {
    start(threads, [](ThreadPool& pool, const void* f) { (*static_cast<const F*>(f))(pool); }, &lead);
  }
  int threads() const { return threads_; }
  // Calls work(thread, i) for every i < count < 2^32, in any order; returns when all calls have returned.
  template <typename F> void for_each(int64_t count, const F& work) {
    run_loop(count, [](const void* f, int thread, int64_t i) { (*static_cast<const F*>(f))(thread, i); }, &work);
  }

 private:
  using Work = void (*)(const void*, int, int64_t);
  static void start(int threads, void (*lead)(ThreadPool&, const void*), const void* context);
  explicit ThreadPool(int threads) : threads_(threads) {}
  void run_loop(int64_t count, Work work, const void* context);
  bool claim_items(int thread);
  void serve(int thread);
  void claim_processor();

  const int threads_;
  std::atomic<int> arrived_{1}, left_{1};
  std::atomic<bool> done_{false};
  std::atomic<uint64_t> claimed_[16] = {};  // one bit per processor that a thread of the pool runs on
  Work work_ = nullptr;
  const void* context_ = nullptr;
  // The loop's item count (high 32 bits) and how many items are claimed (low 32 bits), so that a claim is one atomic
  // step.
  alignas(64) std::atomic<uint64_t> items_{0};
  alignas(64) std::atomic<int64_t> finished_{0};
};

}  // namespace fastalign
