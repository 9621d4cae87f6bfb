// resample with replacement: weights exp(log w - max) in double, the cumulative sums of their blocks, and a search.
// Included only by the per-level files.
#pragma once

#include "philox.h"
#include "resample.h"
#include "resample_row.h"

namespace fastalign::FASTALIGN_LEVEL {

// A share this close to an integer counts as one; the same constant as in the reference.
constexpr double kShareSlack = 1 + 1e-12;

template <typename S> class FromMass {
  const ResampleOptions& o;
  const int threads;
  const int64_t blocks;
  // Weights are kept where they are changed, or where so many are drawn that blocks would often be weighed again.
  const Memory<double> kept, sums;  // sums: cumulative, of blocks
  const Row<S>* row = nullptr;
  double top = 0;
  double inside[kBlock];  // the weights of block `known`, where they are not kept
  int64_t known = -1;
  const double* weights_of_known = nullptr;

 public:
  FromMass(int64_t n, const ResampleOptions& o, int threads)
      : o(o), threads(threads), blocks(blocks_of(n)),
        kept(o.method == ResampleMethod::residual || o.k > blocks / 4 ? blocks * kBlock : 0), sums(blocks) {}
  bool enough() const { return kept.enough && sums.enough; }

  void draw(int64_t* ids, const Row<S>& of, double largest, uint64_t r) {
    row = &of, top = largest;
    weigh_all();
    switch (o.method) {
      case ResampleMethod::residual: return draw_residual(ids, r);
      case ResampleMethod::multinomial: return draw_independent(ids, o.k, r);
      default: return draw_comb(ids, r);
    }
  }

 private:
  double total() const { return sums.data[blocks - 1]; }

  void weigh(double* w, int64_t b) const {
    S spare[kBlock];
    const S* x = row->block(b, spare);
    for (int64_t i = 0; i < kBlock; i += lanes<double>) store<double>(w + i, exp_nonpositive(widen(x + i) - top));
  }

  void weigh_all() {
    in_parts(blocks, threads, [&](int, int64_t begin, int64_t end) {
      double spare[kBlock];
      for (int64_t b = begin; b < end; ++b) {
        double* const w = kept.data != nullptr ? kept.data + b * kBlock : spare;
        weigh(w, b);
        sums.data[b] = sum(w);
      }
    });
    known = -1;
    cumulate();
  }

  static double sum(const double* w) {
    vec<double> total = {};
    for (int64_t i = 0; i < kBlock; i += lanes<double>) total += load<double>(w + i);
    return reduce_add<double>(total);
  }

  void cumulate() {
    for (int64_t b = 1; b < blocks; ++b) sums.data[b] += sums.data[b - 1];
  }

  const double* weights(int64_t b) {
    if (b == known) return weights_of_known;  // a guess that saves waiting for b
    known = b;
    if (kept.data != nullptr) return weights_of_known = kept.data + b * kBlock;
    weigh(inside, b);
    return weights_of_known = inside;
  }

  // The first position whose cumulative sum exceeds share * total. Without branches that depend on the numbers, so that
  // one draw need not wait for another.
  int64_t find(double share) {
    const double below_one = 1 - 0x1p-53, target = (share < below_one ? share : below_one) * total();
    int64_t block = 0;
    for (int64_t left = blocks; left > 1; left -= left / 2) {
      block += sums.data[block + left / 2 - 1] > target ? 0 : left / 2;
    }

    const double* const w = weights(block);
    double reached = block > 0 ? sums.data[block - 1] : 0, before = reached;
    int64_t start = 0, i = 0;  // of the eight weights that exceed the target, and the one of them
    for (const double* v = w; v < w + kBlock; v += 8) {
      reached += ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
      before = reached > target ? before : reached;
      start += reached > target ? 0 : 8;
    }
    if (start == kBlock) start -= 8, before = 0;  // rounding let none exceed it
    for (int64_t j = 0; j < 8; ++j) i += (before += w[start + j]) > target ? 0 : 1;
    for (i = start + (i < 8 ? i : 7); i > 0 && !(w[i] > 0);) --i;  // to one with any weight
    return block * kBlock + i;
  }

  void draw_independent(int64_t* ids, int64_t count, uint64_t r) {
    for (int64_t j = 0; j < count; ++j) ids[j] = find(philox_uniform(o.seed, r, kDomain | uint64_t(j)));
  }

  void draw_comb(int64_t* ids, uint64_t r) {
    const bool own = o.method == ResampleMethod::stratified;
    double u = philox_uniform(o.seed, r, kDomain);
    for (int64_t j = 0; j < o.k; ++j) {
      if (own) u = philox_uniform(o.seed, r, kDomain | uint64_t(j));
      ids[j] = find((double(j) + u) / double(o.k));
    }
  }

  void draw_residual(int64_t* ids, uint64_t r) {
    const double per_weight = double(o.k) / total();
    int64_t used = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      double* const w = kept.data + b * kBlock;
      for (int64_t start = 0; start < kBlock; start += lanes<double>) {
        const vec<double> shares = load<double>(w + start) * per_weight;
        store<double>(w + start, shares);
        for (uint32_t mask = lane_mask(shares * kShareSlack >= 1); mask != 0; mask &= mask - 1) {
          const int64_t i = start + __builtin_ctz(mask), copies = int64_t(w[i] * kShareSlack);
          for (int64_t c = 0; c < copies && used < o.k; ++c) ids[used++] = b * kBlock + i;
          w[i] = w[i] > double(copies) ? w[i] - double(copies) : 0;
        }
      }
      sums.data[b] = sum(w);
    }
    cumulate();
    draw_independent(ids + used, o.k - used, r);
  }
};

}  // namespace fastalign::FASTALIGN_LEVEL
