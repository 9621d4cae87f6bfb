#include "soup_digest.h"

#include <array>
#include <cstring>
#include <memory>

#include "soup_io.h"

namespace fastalign {

static constexpr int64_t kWords = 512, kBlock = kWords * 8;
static constexpr int64_t kRead = 1 << 20;

static uint64_t odd(uint64_t x) {  // splitmix64
  x = (x + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return (x ^ x >> 31) | 1;
}

static const std::array<uint64_t, kWords> kFactors = [] {
  std::array<uint64_t, kWords> factors;
  for (int64_t i = 0; i < kWords; ++i) factors[size_t(i)] = odd(uint64_t(i));
  return factors;
}();

// Bytes of one block, from byte `at` of it on.
static SoupDigest within_block(const char* data, int64_t bytes, int64_t at) {
  SoupDigest sum = 0;
  int64_t word = at / 8;
  if (at % 8 != 0 || bytes < 8) {
    const int64_t shift = at % 8, n = bytes < 8 - shift ? bytes : 8 - shift;
    uint64_t x = 0;
    std::memcpy(reinterpret_cast<char*>(&x) + shift, data, size_t(n));
    sum += SoupDigest(x) * kFactors[size_t(word)];
    data += n, bytes -= n, ++word;
  }
  SoupDigest sums[4] = {};  // apart, so that one addition need not wait for another
  for (; bytes >= 32; data += 32, bytes -= 32, word += 4) {
    uint64_t x[4];
    std::memcpy(x, data, 32);
    for (int i = 0; i < 4; ++i) sums[i] += SoupDigest(x[i]) * kFactors[size_t(word + i)];
  }
  for (const SoupDigest& one : sums) sum += one;
  for (; bytes >= 8; data += 8, bytes -= 8, ++word) {
    uint64_t x;
    std::memcpy(&x, data, 8);
    sum += SoupDigest(x) * kFactors[size_t(word)];
  }
  if (bytes > 0) {
    uint64_t x = 0;
    std::memcpy(&x, data, size_t(bytes));
    sum += SoupDigest(x) * kFactors[size_t(word)];
  }
  return sum;
}

SoupDigest digest_of(const void* data, int64_t bytes, int64_t position) {
  const char* from = static_cast<const char*>(data);
  SoupDigest sum = 0;
  while (bytes > 0) {
    const int64_t at = position % kBlock, n = bytes < kBlock - at ? bytes : kBlock - at;
    sum += within_block(from, n, at) * odd(~uint64_t(position / kBlock));
    from += n, position += n, bytes -= n;
  }
  return sum;
}

int digest_file(SoupDigest* digest, int file, int64_t bytes, int threads) {
  const int64_t pieces = (bytes + kRead - 1) / kRead;
  SoupDigest total = 0;
  int failed = 0;
#pragma omp parallel num_threads(int(pieces < threads ? (pieces < 1 ? 1 : pieces) : threads))
  {
    const std::unique_ptr<char[]> room(new (std::nothrow) char[size_t(kRead)]);
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < pieces; ++p) {
      const int64_t first = p * kRead, n = bytes - first < kRead ? bytes - first : kRead;
      int error = ENOMEM;
      if (room != nullptr) {
        error = whole([&](char* to, size_t count, off_t at) { return pread(file, to, count, at); }, room.get(), n, first);
      }
      const SoupDigest part = error == 0 ? digest_of(room.get(), n, first) : 0;
#pragma omp critical(soup_digest)
      {
        total += part;
        if (error != 0) failed = error;
      }
    }
  }
  *digest = total;
  return failed;
}

}  // namespace fastalign
