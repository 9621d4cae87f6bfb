// A row of log-weights that is read in blocks, by one thread or by several. Included only by the per-level files.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "lane_mask.h"
#include "simd.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr int64_t kBlock = 64;
constexpr double kMinusInfinity = -__builtin_inf();
// Separates these draws from those of sample_tokens, whose offsets are below 2^63, so that both can share a seed.
constexpr uint64_t kDomain = uint64_t(1) << 63;

inline int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

template <typename T> struct Memory {
  T* const data;
  const bool enough;
  explicit Memory(int64_t count)
      : data(count > 0 ? static_cast<T*>(std::malloc(size_t(count) * sizeof(T))) : nullptr),
        enough(count == 0 || data != nullptr) {}
  ~Memory() { std::free(data); }
  Memory(const Memory&) = delete;
};

// part(t, begin, end) for each thread's part of [0, count).
template <typename F> static void in_parts(int64_t count, int threads, const F& part) {
  if (threads == 1) return part(0, int64_t(0), count);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) part(t, count * t / threads, count * (t + 1) / threads);
}

inline vec<double> widen(const double* p) { return load<double>(p); }
inline vec<double> widen(const float* p) {
#if defined(__AVX512F__)
  return (vec<double>)_mm512_cvtps_pd(_mm256_loadu_ps(p));  // GCC 12 makes two halves of __builtin_convertvector
#elif defined(__AVX2__)
  return (vec<double>)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  vec<double> x;
  for (int l = 0; l < lanes<double>; ++l) x[l] = p[l];
  return x;
#endif
}

template <typename S> struct Row {
  const S* values;
  const bool* mask;
  int64_t n;

  S operator[](int64_t i) const { return mask == nullptr || mask[i] ? values[i] : S(kMinusInfinity); }

  // The log-weights of block b, -inf where masked or beyond the end: in place, or else in `spare`.
  const S* block(int64_t b, S* spare) const {
    const int64_t start = b * kBlock;
    const bool whole = start + kBlock <= n;
    if (whole && mask == nullptr) return values + start;
    if (whole) {
      for (int64_t i = 0; i < kBlock; ++i) spare[i] = mask[start + i] ? values[start + i] : S(kMinusInfinity);
    } else {
      for (int64_t i = 0; i < kBlock; ++i) spare[i] = start + i < n ? (*this)[start + i] : S(kMinusInfinity);
    }
    return spare;
  }

  // The first position of one that is no less.
  int64_t find(S value) const {
    S spare[kBlock];
    for (int64_t b = 0; b < blocks_of(n); ++b) {
      const S* x = block(b, spare);
      for (int64_t i = 0; i < kBlock; i += lanes<S>) {
        if (const uint32_t found = lane_mask(load<S>(x + i) >= value)) return b * kBlock + i + __builtin_ctz(found);
      }
    }
    return -1;
  }

  // The largest; NaN where one not masked is NaN. `tops`: memory, one for each thread.
  double top(int threads, double* tops) const {
    in_parts(blocks_of(n), threads, [&](int t, int64_t begin, int64_t end) {
      S spare[kBlock];
      vec<S> largest = splat<S>(S(kMinusInfinity));
      typename Vec<S>::bits nan = {};
      for (int64_t b = begin; b < end; ++b) {
        const S* x = block(b, spare);
        for (int64_t i = 0; i < kBlock; i += lanes<S>) {
          nan |= load<S>(x + i) != load<S>(x + i);
          largest = max<S>(largest, load<S>(x + i));
        }
      }
      tops[t] = lane_mask(nan) != 0 ? __builtin_nan("") : double(reduce_max<S>(largest));
    });
    double all = tops[0];
    for (int t = 1; t < threads; ++t) all = tops[t] > all || tops[t] != tops[t] ? tops[t] : all;
    return all;
  }
};

}  // namespace fastalign::FASTALIGN_LEVEL
