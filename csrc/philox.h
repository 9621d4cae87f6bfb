// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011): random numbers as a function of a key and a counter.
// Included only by the per-level files.
#pragma once

#include <cstdint>

#include "simd.h"

namespace fastalign::FASTALIGN_LEVEL {

// 64-bit lanes whose low halves are the numbers; the high halves are ignored.
typedef uint64_t wide_words __attribute__((vector_size(kVectorBytes)));

inline uint64_t product(uint64_t a, uint64_t b) { return (a & 0xffffffff) * (b & 0xffffffff); }
inline wide_words product(wide_words a, wide_words b) {  // of the low halves
#if defined(__AVX512F__)
  return (wide_words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (wide_words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (wide_words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// c <- the output for the counters c under the key, the four words of each in c[.][v]; Word: uint64_t or lanes of them.
template <typename Word, int V> inline void philox(Word (&c)[4][V], uint64_t key) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  const Word none = {}, m0 = none + 0xD2511F53u, m1 = none + 0xCD9E8D57u;
  for (int round = 0; round < 10; ++round) {
    for (int v = 0; v < V; ++v) {
      const Word p0 = product(c[0][v], m0), p1 = product(c[2][v], m1);
      c[0][v] = (p1 >> 32) ^ c[1][v] ^ k0;
      c[1][v] = p1;
      c[2][v] = (p0 >> 32) ^ c[3][v] ^ k1;
      c[3][v] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// In (0, 1): the first 53 of the 128 bits, times 2^-53, and at least that.
inline double philox_uniform(uint64_t seed, uint64_t row, uint64_t offset) {
  uint64_t c[4][1] = {{row}, {row >> 32}, {offset}, {offset >> 32}};
  philox(c, seed);
  const uint64_t bits = (uint64_t(uint32_t(c[0][0]) >> 5) << 26) | (uint32_t(c[1][0]) >> 6);
  return double(bits == 0 ? 1 : bits) * 0x1p-53;
}

}  // namespace fastalign::FASTALIGN_LEVEL
