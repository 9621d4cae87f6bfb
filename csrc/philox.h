// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011): random numbers as a function of (seed, row, offset).
// Included only by the per-level files.
#pragma once

#include <cstdint>

namespace fastalign::FASTALIGN_LEVEL {

// In (0, 1): the first 53 of the 128 bits, times 2^-53, and at least that.
inline double philox_uniform(uint64_t seed, uint64_t row, uint64_t offset) {
  uint32_t c0 = uint32_t(row), c1 = uint32_t(row >> 32), c2 = uint32_t(offset), c3 = uint32_t(offset >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint64_t bits = (uint64_t(c0 >> 5) << 26) | (c1 >> 6);
  return double(bits == 0 ? 1 : bits) * 0x1p-53;
}

}  // namespace fastalign::FASTALIGN_LEVEL
