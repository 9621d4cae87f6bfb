// A digest of a file that can be taken while it is written, piece by piece and in any order: the sum, modulo 2^128, of its
// 64-bit words, each times an odd number that its place decides. It tells a torn, exchanged or changed file, not a forged one.
#pragma once

#include <cstdint>

namespace fastalign {

typedef unsigned __int128 SoupDigest;

// What `bytes` bytes that begin at byte `position` of the file add to its digest; words may be cut anywhere.
SoupDigest digest_of(const void* data, int64_t bytes, int64_t position);

// Of a whole file of so many bytes; an errno, -1 where it ended early, or 0.
int digest_file(SoupDigest* digest, int file, int64_t bytes, int threads);

}  // namespace fastalign
