#include "crew.h"

#if defined(_OPENMP)
#include <omp.h>
#elif defined(FASTALIGN_STD_THREADS)  // for tools/sanitize.py: ThreadSanitizer sees nothing of OpenMP's
#include <thread>
#include <vector>
#endif
#if defined(__unix__)
#include <sched.h>
#endif

namespace fastalign {

constexpr int kSpins = 2000;  // some 40 microseconds; then others may have the processor

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
template <typename F> static void wait_until(const F& met) {
  for (int spins = 0; !met(); ++spins) {
    if (spins < kSpins) pause();
    else yield();
  }
}

// Two of a crew that wake on one processor would take turns there until the kernel parts them, some ticks later.
void Crew::take_a_processor() {
#if defined(__linux__)
  const auto take = [&](int cpu) {
    const uint64_t bit = uint64_t(1) << (cpu % 64);
    return (taken_[cpu / 64].fetch_or(bit) & bit) == 0;
  };
  constexpr int kMost = 64 * int(sizeof(taken_) / sizeof(taken_[0]));
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

void Crew::start(int threads, void (*lead)(Crew&, const void*), const void* context) {
  Crew crew(threads);
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      if (omp_get_thread_num() > 0) {
        crew.serve(omp_get_thread_num());
      } else {
        const int all = omp_get_num_threads();
        crew.take_a_processor();
        for (int spins = 0; crew.arrived_ < all && spins < kSpins / 10; ++spins) pause();
        if (crew.arrived_ < all) yield();  // to one that woke here, so that it finds another place
        lead(crew, context);
        crew.over_ = true;
        while (crew.gone_ < all) yield();
      }
    }
    return;
  }
#elif defined(FASTALIGN_STD_THREADS)
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back([&crew, i] { crew.serve(i); });
  lead(crew, context);
  crew.over_ = true;
  for (std::thread& other : others) other.join();
  return;
#endif
  lead(crew, context);
}

void Crew::serve(int thread) {
  take_a_processor();
  ++arrived_;
  while (!over_.load(std::memory_order_acquire)) {
    wait_until([&] { return work_off(thread) || over_.load(std::memory_order_acquire); });
  }
  ++gone_;
}

// Claims and does pieces until none is left; false where there was none.
bool Crew::work_off(int thread) {
  bool any = false;
  for (uint64_t seen = pieces_.load(std::memory_order_acquire);;) {
    const uint64_t count = seen >> 32, next = seen & 0xffffffff;
    if (next >= count) return any;
    if (!pieces_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
    any = true;
    // The loop cannot end, nor another begin, before this piece is done: what it is cannot change under us.
    work_(context_, thread, int64_t(next));
    finished_.fetch_add(1, std::memory_order_release);
    seen = pieces_.load(std::memory_order_acquire);
  }
}

void Crew::share(int64_t count, Work work, const void* context) {
  if (threads_ == 1) {
    for (int64_t i = 0; i < count; ++i) work(context, 0, i);
    return;
  }
  work_ = work, context_ = context;
  finished_.store(0, std::memory_order_relaxed);
  pieces_.store(uint64_t(count) << 32, std::memory_order_release);
  work_off(0);
  wait_until([&] { return finished_.load(std::memory_order_acquire) == count; });
}

}  // namespace fastalign
