// From a vector comparison to an integer with one bit per lane. Included only by the per-level files.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace fastalign::FASTALIGN_LEVEL {

// By the size of a lane, not its type: compilers differ in the type of a comparison (`long` or `long long`).
template <typename B> inline uint32_t lane_mask(B x) {
  [[maybe_unused]] constexpr bool narrow = sizeof(x[0]) == 4;
#if defined(__AVX512F__)
  if constexpr (narrow) return _mm512_movepi32_mask((__m512i)x);
  else return _mm512_movepi64_mask((__m512i)x);
#elif defined(__AVX2__)
  return uint32_t(narrow ? _mm256_movemask_ps((__m256)x) : _mm256_movemask_pd((__m256d)x));
#elif defined(__SSE2__)
  return uint32_t(narrow ? _mm_movemask_ps((__m128)x) : _mm_movemask_pd((__m128d)x));
#else
  uint32_t mask = 0;
  for (int i = 0; i < int(sizeof(x) / sizeof(x[0])); ++i) mask |= (uint32_t(x[i]) & 1u) << i;
  return mask;
#endif
}

}  // namespace fastalign::FASTALIGN_LEVEL
