// A digest of a file that can be taken while it is written, piece by piece and in any order: the sum, modulo 2^128, of
// its 64-bit words, each times an odd number that depends on its position. It detects a torn, swapped or changed file,
// not a forged one.
#pragma once

#include <cstdint>

namespace fastalign {

typedef unsigned __int128 SoupDigest;

// The contribution of `bytes` bytes from byte `position` of the file on; the range need not be aligned to words.
SoupDigest digest_of(const void* data, int64_t bytes, int64_t position);

// The digest of a whole file of `bytes` bytes. Returns 0, an errno, or -1 if the file ended early.
int digest_file(SoupDigest* digest, int file, int64_t bytes, int threads);

}  // namespace fastalign
