// From a vector comparison to an integer with one bit per lane. Included only by the per-level files.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace fastalign::FASTALIGN_LEVEL {

#if defined(__AVX512F__)
inline uint32_t lane_mask(Vec<float>::bits x) { return _mm512_movepi32_mask((__m512i)x); }
inline uint32_t lane_mask(Vec<double>::bits x) { return _mm512_movepi64_mask((__m512i)x); }
#elif defined(__AVX2__)
inline uint32_t lane_mask(Vec<float>::bits x) { return uint32_t(_mm256_movemask_ps((__m256)x)); }
inline uint32_t lane_mask(Vec<double>::bits x) { return uint32_t(_mm256_movemask_pd((__m256d)x)); }
#elif defined(__SSE2__)
inline uint32_t lane_mask(Vec<float>::bits x) { return uint32_t(_mm_movemask_ps((__m128)x)); }
inline uint32_t lane_mask(Vec<double>::bits x) { return uint32_t(_mm_movemask_pd((__m128d)x)); }
#else
template <typename B> inline uint32_t lane_mask(B x) {
  uint32_t mask = 0;
  for (int i = 0; i < int(sizeof(x) / sizeof(x[0])); ++i) mask |= (uint32_t(x[i]) & 1u) << i;
  return mask;
}
#endif

}  // namespace fastalign::FASTALIGN_LEVEL
