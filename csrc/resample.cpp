// resample: weights exp(log w - max) cumulated in double and searched, or the k largest keys. Built once per level.
#include "resample.h"

#include <algorithm>
#include <cstdlib>

#include "lane_mask.h"
#include "philox.h"
#include "softmax.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr int64_t kSumBlock = 64;  // weights under one cumulative sum
constexpr double kMinusInfinity = -__builtin_inf();
// Separates these draws from those of sample_tokens, whose offsets are below 2^63, so that both can share a seed.
constexpr uint64_t kDomain = uint64_t(1) << 63;
// A share this close to an integer counts as one; the same constant as in the reference.
constexpr double kShareSlack = 1 + 1e-12;

struct Candidate {
  double key;
  int64_t index;
};
struct LargestFirst {
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.key != b.key ? a.key > b.key : a.index < b.index;
  }
};

// Memory of one thread for rows of n: values and their sums by blocks or, for the methods that sort, candidates.
struct Scratch {
  double *values, *sums;
  Candidate* candidates;
  int64_t room;
  Scratch(int64_t n, const ResampleOptions& o) : candidates(nullptr), room(0) {
    const int64_t full = padded(n, kSumBlock);
    values = static_cast<double*>(std::malloc(size_t(full + full / kSumBlock) * sizeof(double)));
    sums = values + full;
    if (o.method != ResampleMethod::gumbel_top_k && o.method != ResampleMethod::best) return;
    const int64_t wanted = o.k < n ? o.k : n;
    room = 2 * wanted + 6;
    candidates = static_cast<Candidate*>(std::malloc(size_t(room) * sizeof(Candidate)));
  }
  bool enough() const { return values != nullptr && (room == 0 || candidates != nullptr); }
  ~Scratch() {
    std::free(values);
    std::free(candidates);
  }
  Scratch(const Scratch&) = delete;
};

// The log-weights as doubles, -inf where masked, padded to whole blocks. The largest; NaN where one not masked is NaN.
template <typename S> static double load_row(double* out, const S* row, const bool* mask, int64_t n) {
  constexpr int64_t L = lanes<double>;
  vec<double> top = splat<double>(kMinusInfinity);
  Vec<double>::bits nan = {};
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = start + kBlock < n ? start + kBlock : n, full = padded(end, kSumBlock);
    for (int64_t i = start; i < end; ++i) out[i] = double(row[i]);
    if (mask != nullptr) {
      for (int64_t i = start; i < end; ++i) out[i] = mask[i] ? out[i] : kMinusInfinity;
    }
    for (int64_t i = end; i < full; ++i) out[i] = kMinusInfinity;
    for (int64_t i = start; i < full; i += L) {
      const vec<double> x = load<double>(out + i);
      nan |= x != x;
      top = max<double>(top, x);
    }
  }
  return lane_mask(nan) != 0 ? __builtin_nan("") : reduce_max<double>(top);
}

// Weights in whole blocks, and the cumulative sums of the blocks.
struct Mass {
  double *weights, *cumulative;
  int64_t blocks;
  double total() const { return cumulative[blocks - 1]; }

  void cumulate() {
    constexpr int64_t L = lanes<double>;
    double before = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      vec<double> sum = {};
      for (int64_t i = b * kSumBlock; i < (b + 1) * kSumBlock; i += L) sum += load<double>(weights + i);
      cumulative[b] = before += reduce_add<double>(sum);
    }
  }

  // The first position whose cumulative sum exceeds share * total.
  int64_t find(double share) const {
    const double below_one = 1 - 0x1p-53, target = (share < below_one ? share : below_one) * total();
    int64_t low = 0, high = blocks - 1;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (cumulative[middle] > target) high = middle;
      else low = middle + 1;
    }
    double before = low > 0 ? cumulative[low - 1] : 0;
    int64_t last = low * kSumBlock;  // with any weight, in case rounding lets none exceed the target
    for (int64_t i = low * kSumBlock; i < (low + 1) * kSumBlock; ++i) {
      before += weights[i];
      if (weights[i] > 0) {
        last = i;
        if (before > target) break;
      }
    }
    return last;
  }
};

// Replaces values[0:n] with the weights exp(values - top).
static Mass weigh(int64_t n, double top, const Scratch& work) {
  constexpr int64_t L = lanes<double>;
  Mass mass = {work.values, work.sums, (n + kSumBlock - 1) / kSumBlock};
  for (int64_t i = 0; i < mass.blocks * kSumBlock; i += L) {
    store<double>(mass.weights + i, exp_nonpositive(load<double>(mass.weights + i) - top));
  }
  mass.cumulate();
  return mass;
}

static void draw_independent(int64_t* ids, int64_t count, const Mass& mass, uint64_t seed, uint64_t row) {
  for (int64_t j = 0; j < count; ++j) ids[j] = mass.find(philox_uniform(seed, row, kDomain | uint64_t(j)));
}

static void draw_comb(int64_t* ids, const ResampleOptions& o, const Mass& mass, uint64_t row) {
  const bool own = o.method == ResampleMethod::stratified;
  double u = philox_uniform(o.seed, row, kDomain);
  for (int64_t j = 0; j < o.k; ++j) {
    if (own) u = philox_uniform(o.seed, row, kDomain | uint64_t(j));
    ids[j] = mass.find((double(j) + u) / double(o.k));
  }
}

static void draw_residual(int64_t* ids, const ResampleOptions& o, Mass mass, uint64_t row) {
  const double per_weight = double(o.k) / mass.total();
  int64_t used = 0;
  for (int64_t i = 0; i < mass.blocks * kSumBlock; ++i) {
    const double share = mass.weights[i] * per_weight;
    const int64_t copies = int64_t(share * kShareSlack);
    mass.weights[i] = share > double(copies) ? share - double(copies) : 0;
    for (int64_t c = 0; c < copies && used < o.k; ++c) ids[used++] = i;
  }
  mass.cumulate();
  draw_independent(ids + used, o.k - used, mass, o.seed, row);
}

// ids <- the k largest keys, largest first, the lower index first among ties; -1 after the last finite one.
static void draw_largest(int64_t* ids, const ResampleOptions& o, int64_t n, double top, uint64_t row, const Scratch& work) {
  const bool perturbed = o.method == ResampleMethod::gumbel_top_k;
  // A key must exceed `least` to be among the k: at a tie the earlier index is already among them. For k = 1 no key but
  // 0 is nearer to 0 than a normal number; a smaller one is 0 where denormals are flushed.
  double least = !perturbed && o.k == 1 ? -__DBL_MIN__ : kMinusInfinity;
  int64_t count = 0;
  const auto take = [&](int64_t i, double key) {
    work.candidates[count++] = {key, i};
    if (count == work.room) {
      std::nth_element(work.candidates, work.candidates + o.k - 1, work.candidates + count, LargestFirst());
      count = o.k;
      least = work.candidates[o.k - 1].key;
    }
  };
  for (int64_t i = 0; i < n; i += lanes<double>) {
    const vec<double> d = load<double>(work.values + i) - top;
    if (!perturbed) {
      for (uint32_t mask = lane_mask(d > least); mask != 0; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        if (d[lane] > least) take(i + lane, d[lane]);
      }
      continue;
    }
    // d - log(-log u) > least needs u > exp(-y), y = exp(d - least), and so u > 1 - y: two logarithms saved for most.
    vec<double> enough = {};
    if (least > kMinusInfinity) enough = 1.0 - exp(d - least) * (1 + 1e-6) - 1e-15;
    for (uint32_t mask = lane_mask(d > kMinusInfinity); mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      const double u = philox_uniform(o.seed, row, kDomain | uint64_t(i + lane));
      if (u <= enough[lane]) continue;
      const double key = d[lane] - __builtin_log(-__builtin_log(u));
      if (key > least) take(i + lane, key);
    }
  }
  const int64_t drawn = count < o.k ? count : o.k;
  if (drawn < count) {
    std::nth_element(work.candidates, work.candidates + drawn - 1, work.candidates + count, LargestFirst());
  }
  std::sort(work.candidates, work.candidates + drawn, LargestFirst());
  for (int64_t j = 0; j < o.k; ++j) ids[j] = j < drawn ? work.candidates[j].index : -1;
}

template <typename S>
static void resample_row(int64_t* ids, const S* row, const bool* mask, int64_t n, const ResampleOptions& o, uint64_t r,
                         const Scratch& work) {
  const double top = load_row(work.values, row, mask, n);
  if (!(top > kMinusInfinity && top < -kMinusInfinity)) {
    for (int64_t j = 0; j < o.k; ++j) ids[j] = -1;
    return;
  }
  if (work.room > 0) return draw_largest(ids, o, n, top, r, work);
  const Mass mass = weigh(n, top, work);
  switch (o.method) {
    case ResampleMethod::residual: return draw_residual(ids, o, mass, r);
    case ResampleMethod::multinomial: return draw_independent(ids, o.k, mass, o.seed, r);
    default: return draw_comb(ids, o, mass, r);
  }
}

template <typename S>
static bool resample_rows(int64_t* ids, const Rows& log_weights, const ResampleOptions& o, int threads) {
  const int64_t n = log_weights.vocab;
  bool enough = true;
  if (threads > log_weights.count) threads = int(log_weights.count);
#pragma omp parallel num_threads(threads) reduction(&& : enough)
  {
    const Scratch work(n, o);
    enough = work.enough();
#pragma omp for schedule(static)
    for (int64_t r = 0; r < log_weights.count; ++r) {
      if (!enough) continue;
      const bool* mask = o.mask != nullptr ? o.mask + r * n : nullptr;
      resample_row<S>(ids + r * o.k, log_weights.row<S>(r), mask, n, o, uint64_t(r), work);
    }
  }
  return enough;
}

bool resample(int64_t* ids, const Rows& log_weights, const ResampleOptions& o, int threads) {
  if (log_weights.count == 0) return true;
  return log_weights.dtype == DType::float64 ? resample_rows<double>(ids, log_weights, o, threads)
                                             : resample_rows<float>(ids, log_weights, o, threads);
}

}  // namespace fastalign::FASTALIGN_LEVEL
