// resample: weights exp(log w - max) cumulated in double and searched, or the k largest keys. Built once per level.
#include "resample.h"

#include <algorithm>
#include <cstdlib>

#include "philox.h"
#include "simd.h"
#include "softmax.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr double kMinusInfinity = -__builtin_inf();
// Sets these draws apart from those of sample_tokens, whose offsets are below 2^63: one seed serves both.
constexpr uint64_t kDomain = uint64_t(1) << 63;
// A share that is whole but for rounding is whole; the same number as in the reference.
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

// Memory of one thread for rows of n: values in whole vectors and, for the methods that sort, candidates.
struct Scratch {
  double* values;
  Candidate* candidates;
  int64_t room;
  Scratch(int64_t n, const ResampleOptions& o) : candidates(nullptr), room(0) {
    values = static_cast<double*>(std::malloc(size_t(padded(n, lanes<double>)) * sizeof(double)));
    if (o.method != ResampleMethod::gumbel_top_k && o.method != ResampleMethod::best) return;
    const int64_t wanted = o.k < n ? o.k : n;
    room = 2 * wanted + 1024;
    candidates = static_cast<Candidate*>(std::malloc(size_t(room) * sizeof(Candidate)));
  }
  bool enough() const { return values != nullptr && (room == 0 || candidates != nullptr); }
  ~Scratch() {
    std::free(values);
    std::free(candidates);
  }
  Scratch(const Scratch&) = delete;
};

// The log-weights as doubles, -inf where masked, into out[0:n]. The largest; NaN where one that is not masked is NaN.
template <typename S> static double load_row(double* out, const S* row, const bool* mask, int64_t n) {
  double top = kMinusInfinity;
  bool nan = false;
  for (int64_t i = 0; i < n; ++i) {
    const double x = mask == nullptr || mask[i] ? double(row[i]) : kMinusInfinity;
    out[i] = x;
    nan |= x != x;
    top = x > top ? x : top;
  }
  return nan ? __builtin_nan("") : top;
}

// values[0:n] <- exp(values - top)
static void to_weights(double* values, int64_t n, double top) {
  constexpr int64_t L = lanes<double>;
  for (int64_t i = n; i < padded(n, L); ++i) values[i] = kMinusInfinity;
  for (int64_t i = 0; i < n; i += L) store<double>(values + i, exp_nonpositive(load<double>(values + i) - top));
}

static double cumulate(double* values, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) values[i] = sum += values[i];
  return sum;
}

// The first position from `low` on whose cumulative sum exceeds share * total.
static int64_t search(const double* cumulative, int64_t low, int64_t n, double share, double total) {
  const double below_one = 1 - 0x1p-53, target = (share < below_one ? share : below_one) * total;
  int64_t high = n - 1;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (cumulative[middle] > target) high = middle;
    else low = middle + 1;
  }
  return low;
}

static void draw_independent(int64_t* ids, int64_t count, const double* cumulative, int64_t n, double total, uint64_t seed,
                             uint64_t row) {
  for (int64_t j = 0; j < count; ++j) {
    ids[j] = search(cumulative, 0, n, philox_uniform(seed, row, kDomain | uint64_t(j)), total);
  }
}

static void draw_comb(int64_t* ids, const ResampleOptions& o, const double* cumulative, int64_t n, double total,
                      uint64_t row) {
  const bool own = o.method == ResampleMethod::stratified;
  double u = philox_uniform(o.seed, row, kDomain);
  int64_t at = 0;
  for (int64_t j = 0; j < o.k; ++j) {
    if (own) u = philox_uniform(o.seed, row, kDomain | uint64_t(j));
    ids[j] = at = search(cumulative, at, n, (double(j) + u) / double(o.k), total);
  }
}

static void draw_residual(int64_t* ids, const ResampleOptions& o, double* weights, int64_t n, uint64_t row) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += weights[i];
  const double per_weight = double(o.k) / total;
  int64_t used = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double share = weights[i] * per_weight, copies = __builtin_floor(share * kShareSlack);
    for (int64_t c = 0; c < int64_t(copies) && used < o.k; ++c) ids[used++] = i;
    weights[i] = share > copies ? share - copies : 0;
  }
  if (used == o.k) return;
  const double rest = cumulate(weights, n);
  draw_independent(ids + used, o.k - used, weights, n, rest, o.seed, row);
}

// ids <- the k largest keys, largest first, the lower index first among ties; -1 after the last finite one.
static void draw_largest(int64_t* ids, const ResampleOptions& o, int64_t n, double top, uint64_t row, const Scratch& work) {
  const bool perturbed = o.method == ResampleMethod::gumbel_top_k;
  double least = kMinusInfinity;  // a key must exceed it to be among the k: at a tie the earlier index is there already
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    double key = work.values[i] - top;
    if (key == kMinusInfinity) continue;
    if (perturbed) key -= __builtin_log(-__builtin_log(philox_uniform(o.seed, row, kDomain | uint64_t(i))));
    if (!(key > least)) continue;
    work.candidates[count++] = {key, i};
    if (count == work.room) {
      std::nth_element(work.candidates, work.candidates + o.k - 1, work.candidates + count, LargestFirst());
      count = o.k;
      least = work.candidates[o.k - 1].key;
    }
  }
  const int64_t found = count < o.k ? count : o.k;
  if (found < count) {
    std::nth_element(work.candidates, work.candidates + found - 1, work.candidates + count, LargestFirst());
  }
  std::sort(work.candidates, work.candidates + found, LargestFirst());
  for (int64_t j = 0; j < o.k; ++j) ids[j] = j < found ? work.candidates[j].index : -1;
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
  to_weights(work.values, n, top);
  if (o.method == ResampleMethod::residual) return draw_residual(ids, o, work.values, n, r);
  const double total = cumulate(work.values, n);
  if (o.method == ResampleMethod::multinomial) return draw_independent(ids, o.k, work.values, n, total, o.seed, r);
  draw_comb(ids, o, work.values, n, total, r);
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
#pragma omp for schedule(dynamic)
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
