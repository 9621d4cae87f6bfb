#include "thread_pool.h"

#if defined(_OPENMP)
#include <omp.h>
#elif defined(FASTALIGN_STD_THREADS)  // for tools/sanitize.py: ThreadSanitizer does not understand OpenMP
#include <thread>
#include <vector>
#endif
#if defined(__unix__)
#include <sched.h>
#endif

namespace fastalign {

constexpr int kSpins = 2000;  // about 40 microseconds; then yield the processor

static void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}
static void yield() {
#if defined(__unix__)
  sched_yield();
#endif
}
template <typename F> static void wait_until(const F& done) {
  for (int spins = 0; !done(); ++spins) {
    if (spins < kSpins) pause();
    else yield();
  }
}

// Two threads that wake on the same processor would share it until the kernel moves one of them, some ticks later.
void ThreadPool::claim_processor() {
#if defined(__linux__)
  const auto take = [&](int cpu) {
    const uint64_t bit = uint64_t(1) << (cpu % 64);
    return (claimed_[cpu / 64].fetch_or(bit) & bit) == 0;
  };
  constexpr int kMost = 64 * int(sizeof(claimed_) / sizeof(claimed_[0]));
  const int here = sched_getcpu();
  cpu_set_t allowed;
  if (here < 0 || here >= kMost || take(here) || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  for (int cpu = 0; cpu < kMost && cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || !take(cpu)) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (sched_setaffinity(0, sizeof one, &one) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
    return;
  }
#endif
}

void ThreadPool::start(int threads, void (*lead)(ThreadPool&, const void*), const void* context) {
  ThreadPool pool(threads);
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      if (omp_get_thread_num() > 0) {
        pool.serve(omp_get_thread_num());
      } else {
        const int all = omp_get_num_threads();
        pool.claim_processor();
        for (int spins = 0; pool.arrived_ < all && spins < kSpins / 10; ++spins) pause();
        if (pool.arrived_ < all) yield();  // to a thread that woke here, so that it moves to another processor
        lead(pool, context);
        pool.done_ = true;
        while (pool.left_ < all) yield();
      }
    }
    return;
  }
#elif defined(FASTALIGN_STD_THREADS)
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back([&pool, i] { pool.serve(i); });
  lead(pool, context);
  pool.done_ = true;
  for (std::thread& other : others) other.join();
  return;
#endif
  lead(pool, context);
}

void ThreadPool::serve(int thread) {
  claim_processor();
  ++arrived_;
  while (!done_.load(std::memory_order_acquire)) {
    wait_until([&] { return claim_items(thread) || done_.load(std::memory_order_acquire); });
  }
  ++left_;
}

// Claims and processes items until none is left; false if there was none.
bool ThreadPool::claim_items(int thread) {
  bool any = false;
  for (uint64_t seen = items_.load(std::memory_order_acquire);;) {
    const uint64_t count = seen >> 32, next = seen & 0xffffffff;
    if (next >= count) return any;
    if (!items_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
    any = true;
    // This loop cannot end, and no other can begin, before this item is finished: work_ and context_ stay valid.
    work_(context_, thread, int64_t(next));
    finished_.fetch_add(1, std::memory_order_release);
    seen = items_.load(std::memory_order_acquire);
  }
}

void ThreadPool::run_loop(int64_t count, Work work, const void* context) {
  if (threads_ == 1) {
    for (int64_t i = 0; i < count; ++i) work(context, 0, i);
    return;
  }
  work_ = work, context_ = context;
  finished_.store(0, std::memory_order_relaxed);
  items_.store(uint64_t(count) << 32, std::memory_order_release);
  claim_items(0);
  wait_until([&] { return finished_.load(std::memory_order_acquire) == count; });
}

}  // namespace fastalign
