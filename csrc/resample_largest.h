// resample without replacement: the k largest keys, in double, of those that bounds in vectors leave. Included only by
// the per-level files.
#pragma once

#include <algorithm>
#include <cstring>

#include "philox.h"
#include "resample.h"
#include "resample_row.h"

namespace fastalign::FASTALIGN_LEVEL {

struct Candidate {
  double key;
  int64_t index;
};
struct LargestFirst {
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.key != b.key ? a.key > b.key : a.index < b.index;
  }
  bool operator()(float a, float b) const { return a > b; }
  bool operator()(double a, double b) const { return a > b; }
};

inline int64_t between(int64_t low, int64_t x, int64_t high) { return x < low ? low : (x > high ? high : x); }

// ids <- the k largest of the candidates, largest first; -1 where there are no more.
static inline void sort_largest(int64_t* ids, int64_t k, Candidate* candidates, int64_t count) {
  const int64_t drawn = count < k ? count : k;
  for (int64_t j = drawn; j < k; ++j) ids[j] = -1;
  if (count > kBlock) {
    if (drawn < count) std::nth_element(candidates, candidates + drawn - 1, candidates + count, LargestFirst());
    std::sort(candidates, candidates + drawn, LargestFirst());
    for (int64_t j = 0; j < drawn; ++j) ids[j] = candidates[j].index;
    return;
  }
  // A few: each goes where as many are before it. No branch depends on their order.
  double keys[kBlock], indices[kBlock];
  for (int64_t i = 0; i < count; ++i) keys[i] = candidates[i].key, indices[i] = double(candidates[i].index);
  for (int64_t i = count; i % lanes<double> != 0; ++i) keys[i] = kMinusInfinity, indices[i] = 0;
  for (int64_t i = 0; i < count; ++i) {
    int64_t place = 0;
    for (int64_t j = 0; j < count; j += lanes<double>) {
      const vec<double> key = load<double>(keys + j), index = load<double>(indices + j);
      place += __builtin_popcount(lane_mask((key > keys[i]) | ((key == keys[i]) & (index < indices[i]))));
    }
    if (place < drawn) ids[place] = candidates[i].index;
  }
}

// M: the type of the bounds by which most elements are ruled out.
template <typename M> class Largest {
  static constexpr int64_t kMostBlocks = 64;  // in a tile, whose lanes are the groups

 protected:
  const ResampleOptions& o;
  const int threads;
  const int64_t n, k, blocks;

 private:
  // Some four groups for each of the k, so that the kth largest maximum is little less than the kth largest of all.
  const int64_t tile, tiles, room;
  const Memory<M> maxima;
  const Memory<Candidate> candidates;  // `room` for each thread
  const Memory<int64_t> counts;

 public:
  Largest(int64_t n, const ResampleOptions& o, int threads)
      : o(o), threads(threads), n(n), k(o.k < n ? o.k : n), blocks(blocks_of(n)),
        tile(between(1, blocks * lanes<M> / (4 * k), kMostBlocks)), tiles((blocks + tile - 1) / tile), room(2 * k + 6),
        maxima(tiles * lanes<M>), candidates(threads * room), counts(threads) {}
  bool enough() const { return maxima.enough && candidates.enough && counts.enough; }

 protected:
  // A number that at least k elements reach. lower(b, spare): the lower bounds of block b, in `spare` or elsewhere.
  template <typename Lower> M reached_by_k(const Lower& lower) const {
    constexpr M none = M(kMinusInfinity);
    in_parts(tiles, threads, [&](int, int64_t begin, int64_t end) {
      M spare[kBlock];
      for (int64_t t = begin; t < end; ++t) {
        vec<M> largest = splat<M>(none);
        for (int64_t b = t * tile; b < between(0, (t + 1) * tile, blocks); ++b) {
          const M* x = lower(b, spare);
          for (int64_t i = 0; i < kBlock; i += lanes<M>) largest = max<M>(largest, load<M>(x + i));
        }
        store<M>(maxima.data + t * lanes<M>, largest);
      }
    });
    M* const end = maxima.data + tiles * lanes<M>;
    if (k > end - maxima.data) return none;
    if (k == 1) return *std::min_element(maxima.data, end, LargestFirst());  // the first in that order
    std::nth_element(maxima.data, maxima.data + k - 1, end, LargestFirst());
    return maxima.data[k - 1];
  }

  // ids <- the k largest keys, largest first, the lower index first among ties; -1 after the last finite one.
  // upper(b, spare): bounds of block b's keys; those below `border` are not among the k. key(i): the key of an element.
  // bound(candidate): what the bound of a larger key must reach or, where keys are kOrderedAsBounds, exceed.
  template <bool kOrderedAsBounds, typename Upper, typename Key, typename Bound>
  void draw_largest(int64_t* ids, const M border, const Upper& upper, const Key& key, const Bound& bound) const {
    in_parts(blocks, threads, [&](int t, int64_t begin, int64_t end) {
      Candidate* const found = candidates.data + t * room;
      int64_t count = 0;
      M spare[kBlock], least_bound = border;
      double least = kMinusInfinity;  // a key must exceed it: at a tie the earlier index is already there
      for (int64_t b = begin; b < end; ++b) {
        const M* x = upper(b, spare);
        for (int64_t i = 0; i < kBlock; i += lanes<M>) {
          uint32_t mask = lane_mask(load<M>(x + i) >= least_bound);
          if (kOrderedAsBounds && least > kMinusInfinity) mask &= lane_mask(load<M>(x + i) > least_bound);
          for (; mask != 0; mask &= mask - 1) {
            const int64_t index = b * kBlock + i + __builtin_ctz(mask);
            if (index >= n) break;
            const Candidate next = {key(index), index};
            if (!(next.key > least)) continue;
            found[count++] = next;
            if (count < room) continue;
            std::nth_element(found, found + k - 1, found + count, LargestFirst());
            count = k;
            least = found[k - 1].key;
            least_bound = bound(found[k - 1]) > border ? bound(found[k - 1]) : border;
          }
        }
      }
      counts.data[t] = count;
    });
    Candidate* const all = candidates.data;
    int64_t count = counts.data[0];
    for (int t = 1; t < threads; ++t) {
      std::memmove(all + count, all + t * room, size_t(counts.data[t]) * sizeof(Candidate));
      count += counts.data[t];
    }
    sort_largest(ids, o.k, all, count);
  }
};

template <typename S> struct Best : Largest<S> {
  using Largest<S>::Largest;

  void draw(int64_t* ids, const Row<S>& row, double top, uint64_t) const {
    if (this->o.k == 1) {
      ids[0] = row.find(S(top));
      return;
    }
    const auto values = [&](int64_t b, S* spare) { return row.block(b, spare); };
    // A key is the difference from the largest in double. Numbers so near each other may share one, and the lower index
    // comes first.
    const double reached = this->reached_by_k(values), near = (top - reached) * 0x1p-51;
    this->template draw_largest<true>(
        ids, S(reached - near), values, [&](int64_t i) { return double(row[i]) - top; },
        [&](const Candidate& c) { return row[c.index]; });
  }
};

// A number's bits, read as an integer, over 2^23 and less the exponent's bias: its log2, or up to 0.0861 less.
inline vec<float> log2_bits(bits32 bits) { return __builtin_convertvector(bits, vec<float>) * 0x1p-23f; }

// From the block's d <= 0 in `upper` to bounds of (d - log E) / log 2, where E = -log u is at least 1 - u and at most
// (1 - u) / u. Of u, the first 27 bits suffice.
static inline void bound_perturbed(float* upper, float* lower, uint64_t seed, uint64_t row, uint64_t first) {
  constexpr int L = lanes<float>, V = 4, kBits = 27;
  constexpr float kPerNat = 1.442695041f, kRelative = 1e-6f, kAbsolute = 1e-4f;  // more than all rounding
  wide_words even;
  for (int l = 0; l < L / 2; ++l) even[l] = 2 * uint64_t(l);
  for (int64_t start = 0; start < kBlock; start += V / 2 * L) {
    wide_words c[4][V];
    for (int v = 0; v < V; ++v) {  // even elements of a vector, then odd ones
      c[0][v] = wide_words{} + row, c[1][v] = wide_words{} + (row >> 32);
      c[2][v] = even + (kDomain | (first + uint64_t(start + v / 2 * L + v % 2))), c[3][v] = c[2][v] >> 32;
    }
    philox(c, seed);
    for (int p = 0; p < V / 2; ++p) {
      const wide_words words = (c[0][2 * p] & 0xffffffff) | (c[0][2 * p + 1] << 32);
      const bits32 u = (bits32)((unsigned32)words >> (32 - kBits)), one_less = ((1 << kBits) - 1) - u;
      const bits32 least = (bits32)__builtin_convertvector(one_less, vec<float>);
      const bits32 most = (bits32)__builtin_convertvector(one_less + 1, vec<float>);
      const vec<float> d = load<float>(upper + start + p * L);
      const bits32 odds = most - (bits32)__builtin_convertvector(u, vec<float>);
      store<float>(lower + start + p * L, d * (kPerNat * (1 + kRelative)) - log2_bits(odds) - (0.0861f + kAbsolute));
      store<float>(upper + start + p * L, d * (kPerNat * (1 - kRelative)) - log2_bits(least) + (127 + kBits + kAbsolute));
    }
  }
}

// The key of an element is d - log(-log u), d = log w - max, with a uniform number of its own.
template <typename S> class Perturbed : public Largest<float> {
  const Memory<float> upper;

 public:
  Perturbed(int64_t n, const ResampleOptions& o, int threads) : Largest<float>(n, o, threads), upper(blocks * kBlock) {}
  bool enough() const { return Largest<float>::enough() && upper.enough; }

  void draw(int64_t* ids, const Row<S>& row, double top, uint64_t r) const {
    const float reached = reached_by_k([&](int64_t b, float* lower) {
      S spare[kBlock];
      const S* x = row.block(b, spare);
      float* const d = upper.data + b * kBlock;
      for (int64_t i = 0; i < kBlock; ++i) d[i] = float(x[i] - S(top));
      bound_perturbed(d, lower, o.seed, r, uint64_t(b * kBlock));
      return lower;
    });
    const auto key = [&](int64_t i) {
      const double d = double(row[i]) - top;
      return d > kMinusInfinity ? d - __builtin_log(-__builtin_log(philox_uniform(o.seed, r, kDomain | uint64_t(i)))) : d;
    };
    draw_largest<false>(
        ids, reached, [&](int64_t b, float*) { return upper.data + b * kBlock; }, key,
        [](const Candidate& c) { return float(c.key * 1.4426950408889634); });
  }
};

}  // namespace fastalign::FASTALIGN_LEVEL
