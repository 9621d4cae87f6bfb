// Threads that stay with one caller through many short loops. OpenMP starts and ends each loop with all its threads: one
// that is late, because another program holds its processor or because it woke on the caller's own, keeps the rest
// waiting for milliseconds at every loop. Here rows are claimed one by one, and who comes late finds less to do.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastalign {

class Crew {
 public:
  // lead(crew) on this thread, beside threads - 1 others that wait for its loops.
  template <typename F> static void gather(int threads, const F& lead) {
    start(threads, [](Crew& crew, const void* f) { (*static_cast<const F*>(f))(crew); }, &lead);
  }
  int threads() const { return threads_; }
  // work(thread, i) for every i < count < 2^32, in any order; returns when all are done.
  template <typename F> void each(int64_t count, const F& work) {
    share(count, [](const void* f, int thread, int64_t i) { (*static_cast<const F*>(f))(thread, i); }, &work);
  }

 private:
  using Work = void (*)(const void*, int, int64_t);
  static void start(int threads, void (*lead)(Crew&, const void*), const void* context);
  explicit Crew(int threads) : threads_(threads) {}
  void share(int64_t count, Work work, const void* context);
  bool work_off(int thread);
  void serve(int thread);
  void take_a_processor();

  const int threads_;
  std::atomic<int> arrived_{1}, gone_{1};
  std::atomic<bool> over_{false};
  std::atomic<uint64_t> taken_[16] = {};  // processors that one of the crew runs on, a bit each
  Work work_ = nullptr;
  const void* context_ = nullptr;
  // How many pieces the loop has and how many are claimed, 32 bits each: claimed in one step, or not at all.
  alignas(64) std::atomic<uint64_t> pieces_{0};
  alignas(64) std::atomic<int64_t> finished_{0};
};

}  // namespace fastalign
