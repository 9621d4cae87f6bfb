// sample_tokens: inverts the cumulative sum in index order. Without filters it reads the row once, block by block, and
// then one block again. With filters the row, or what top_k keeps of it, is copied into a buffer that stays in cache,
// where top_p finds its cut-off with a histogram. Built once per level.
#include "sample_tokens.h"

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "lane_mask.h"
#include "philox.h"
#include "softmax.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr int64_t kBins = 2048;
// A value within the logits' own rounding of top_p or min_p counts as reaching it; the same constants as in the
// reference.
template <typename S> constexpr double kSlack = 0x1p-23;
template <> constexpr double kSlack<double> = 1e-12;
template <> constexpr double kSlack<bfloat16> = 0x1p-7;
template <> constexpr double kSlack<float16> = 0x1p-10;

template <typename C> constexpr C kInfinity = C(__builtin_inf());
template <typename C> constexpr C kLargest = sizeof(C) == 4 ? C(__FLT_MAX__) : C(__DBL_MAX__);
template <typename C> constexpr C kSmallest = sizeof(C) == 4 ? C(__FLT_MIN__) : C(__DBL_MIN__);

template <typename C> struct Draw {
  int64_t id;
  C log_prob;
};
template <typename C> constexpr Draw<C> kNothing = {-1, C(__builtin_nan(""))};

template <typename C> struct Member {
  C x;
  int32_t position;
};

// One thread's memory for rows of `vocab`. Untouched pages cost nothing.
template <typename C> struct Scratch {
  typedef typename Vec<C>::bits bits;
  int64_t room;
  void* memory;
  C *x, *e;               // the remaining tokens, in index order, and their exp
  decltype(bits{}[0] + 0)* bin;
  int32_t* index;         // their indices, where not 0, 1, 2, ..
  Member<C>* members;
  double *mass, *histogram;
  C* shift;

  explicit Scratch(int64_t vocab) : room(padded(vocab, kBlock)), memory(nullptr) {
    const int64_t blocks = room / kBlock;
    const size_t bytes = size_t(room) * (3 * sizeof(C) + sizeof(int32_t) + sizeof(Member<C>)) +
                         size_t(blocks) * (sizeof(double) + sizeof(C)) + (kBins + 1) * sizeof(double) + 64;
    memory = std::malloc(bytes);
    char* at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t(63));
    const auto take = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(at);
      at += size_t(count) * sizeof(*array);
    };
    take(x, room);
    take(e, room);
    take(bin, room);
    take(members, room);
    take(mass, blocks);
    take(histogram, kBins + 1);
    take(index, room);
    take(shift, blocks);
  }
  ~Scratch() { std::free(memory); }
  Scratch(const Scratch&) = delete;
};

// The first position whose cumulative sum exceeds target. If rounding leaves none, the last with any mass.
template <typename C> static int64_t pick(const C* e, int64_t n, double target) {
  constexpr int64_t L = lanes<C>;
  double before = 0;
  for (int64_t i = 0; i < n; i += 4 * L) {
    const vec<C> sum = (load<C>(e + i) + load<C>(e + i + L)) + (load<C>(e + i + 2 * L) + load<C>(e + i + 3 * L));
    const double here = double(reduce_add<C>(sum));
    if (before + here > target) {
      for (int64_t k = i; k < i + 4 * L; ++k) {
        before += double(e[k]);
        if (before > target) return k;
      }
    } else {
      before += here;
    }
  }
  while (n > 0 && !(e[n - 1] > 0)) --n;
  return n - 1;
}

// The first of `blocks` whose cumulative mass exceeds target, else the last with any; `target` loses what is before it.
static int64_t pick_block(const double* mass, int64_t blocks, double& target) {
  int64_t last = 0;
  double before = 0, before_last = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (!(mass[b] > 0)) continue;
    last = b;
    before_last = before;
    before += mass[b];
    if (before > target) break;
  }
  target -= before_last;
  return last;
}

// Prefetches the part of a row that four vectors will need one block later, so that memory is read during the
// computation; prefetching an invalid address is not a fault.
template <typename C, typename S> inline void prefetch_next_block(const S* row) {
  const char* ahead = reinterpret_cast<const char*>(row + kBlock);
  for (int64_t byte = 0; byte < int64_t(4 * lanes<C> * sizeof(S)); byte += 64) __builtin_prefetch(ahead + byte);
}

// Sum of exp((z - shift) * scale) over z[0:n], which came from `row`.
template <typename S, typename C> static C sum_exp_scaled(const C* z, int64_t n, C shift, C scale, const S* row) {
  constexpr int64_t L = lanes<C>;
  vec<C> s0 = {}, s1 = {}, s2 = {}, s3 = {};
  for (int64_t i = 0; i < n; i += 4 * L) {
    prefetch_next_block<C>(row + i);
    s0 += exp_nonpositive((load<C>(z + i) - shift) * scale);
    s1 += exp_nonpositive((load<C>(z + i + L) - shift) * scale);
    s2 += exp_nonpositive((load<C>(z + i + 2 * L) - shift) * scale);
    s3 += exp_nonpositive((load<C>(z + i + 3 * L) - shift) * scale);
  }
  return reduce_add<C>((s0 + s1) + (s2 + s3));
}

// ---- no filter ----

template <typename S, typename C>
static Draw<C> draw_from_all(const S* row, int64_t vocab, C scale, double u, const Scratch<C>& work) {
  constexpr int64_t L = lanes<C>;
  alignas(64) C buffer[kBlock];
  const RowTransform<C> identity(Transform{});
  const int64_t blocks = (vocab + kBlock - 1) / kBlock;
  const auto block = [&](int64_t b, int64_t* full) {
    const int64_t n = b + 1 < blocks ? kBlock : vocab - b * kBlock;
    *full = padded(n, 4 * L);
    return transformed_block(row + b * kBlock, n, identity, buffer);
  };
  C top = -kInfinity<C>;
  int64_t full;
  for (int64_t b = 0; b < blocks; ++b) {
    const C* z = block(b, &full);
    const C here = block_max<C>(z, full);
    top = here > top ? here : top;
    work.shift[b] = is_neg_inf(top) ? C(0) : top;
    work.mass[b] = double(sum_exp_scaled<S, C>(z, full, work.shift[b], scale, row + b * kBlock));
  }
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (work.mass[b] != 0 && work.shift[b] != top) work.mass[b] *= double(exp((work.shift[b] - top) * scale));
    total += work.mass[b];
  }
  if (!(total > 0) || !(top <= kLargest<C>)) return kNothing<C>;  // NaN fails the first, and so does +inf
  double target = u * total;
  const int64_t chosen = pick_block(work.mass, blocks, target);
  const C* z = block(chosen, &full);
  // exp with the same shift as in the sum, so that the same tokens have mass.
  target /= work.shift[chosen] == top ? 1.0 : double(exp((work.shift[chosen] - top) * scale));
  for (int64_t i = 0; i < full; i += L) {
    store<C>(work.e + i, exp_nonpositive((load<C>(z + i) - work.shift[chosen]) * scale));
  }
  const int64_t at = pick<C>(work.e, full, target);
  return {chosen * kBlock + at, C(double((z[at] - top) * scale) - __builtin_log(total))};
}

template <typename S, typename C> static Draw<C> largest(const S* row, int64_t vocab) {
  constexpr int64_t L = lanes<C>;
  alignas(64) C buffer[kBlock];
  const RowTransform<C> identity(Transform{});
  C top = -kInfinity<C>;
  int64_t id = -1;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = vocab - start < kBlock ? vocab - start : kBlock, full = padded(n, 4 * L);
    const C* z = transformed_block(row + start, n, identity, buffer);
    typename Vec<C>::bits nan = {};
    for (int64_t i = 0; i < full; i += 4 * L) {
      prefetch_next_block<C>(row + start + i);
      for (int64_t k = i; k < i + 4 * L; k += L) nan |= load<C>(z + k) != load<C>(z + k);
    }
    if (lane_mask(nan) != 0) return kNothing<C>;
    const C here = block_max<C>(z, full);
    if (here > top) {
      top = here;
      int64_t k = 0;
      while (z[k] != top) ++k;
      id = start + k;
    }
  }
  return id < 0 || !(top <= kLargest<C>) ? kNothing<C> : Draw<C>{id, C(0)};
}

// ---- filters: first collect the remaining tokens in work.x ----

// The whole row. False on NaN.
template <typename S, typename C> static bool load_all(const S* row, int64_t vocab, const Scratch<C>& work) {
  constexpr int64_t L = lanes<C>;
  typename Vec<C>::bits nan = {};
  int64_t i = 0;
  for (; i + L <= vocab; i += L) {
    const vec<C> x = Storage<S>::load_wide(row + i);
    nan |= x != x;
    store<C>(work.x + i, x);
  }
  bool any = lane_mask(nan) != 0;
  for (; i < vocab; ++i) {
    work.x[i] = Storage<S>::widen(row[i]);
    any |= work.x[i] != work.x[i];
  }
  return !any;
}

struct Descending {
  template <typename T> bool operator()(T a, T b) const { return a > b; }
};

// The bin of each of x[0:n] (whole vectors), 0 for the top, by (top - x) * scale * per_bin but at most kBins.
template <typename C>
static void bins_below(const C* x, int64_t n, C top, C scale, C per_bin, const Scratch<C>& work) {
  for (int64_t i = 0; i < n; i += lanes<C>) {
    vec<C> q = (top - load<C>(x + i)) * scale * per_bin;
    q = q < C(kBins) ? q : splat<C>(C(kBins));
    const auto bin = __builtin_convertvector(q, typename Vec<C>::bits);
    std::memcpy(work.bin + i, &bin, sizeof(bin));
  }
}

// The k-th largest of work.e[0:n], which is left in disorder: the bin that holds it, its bin in turn, then a partition.
template <typename C> static C kth_largest(int64_t n, int64_t k, const Scratch<C>& work) {
  constexpr int64_t L = lanes<C>, kFew = 1024;
  while (n > kFew) {
    C top = work.e[0], bottom = work.e[0];
    for (int64_t i = 1; i < n; ++i) {
      top = work.e[i] > top ? work.e[i] : top;
      bottom = work.e[i] < bottom ? work.e[i] : bottom;
    }
    const C range = top - bottom;
    if (range == 0) return top;
    if (!(range > C(1e-30) && range <= kLargest<C>)) break;  // no finite number of bins per unit
    int32_t counts[kBins + 1] = {};
    for (int64_t i = n; i < padded(n, L); ++i) work.e[i] = top;  // not counted
    bins_below<C>(work.e, n, top, C(1), C(kBins) / range, work);
    for (int64_t i = 0; i < n; ++i) ++counts[work.bin[i]];
    int64_t border = 0;
    while (counts[border] < k) k -= counts[border++];
    int64_t members = 0;
    for (int64_t i = 0; i < n; ++i) {
      work.e[members] = work.e[i];
      members += work.bin[i] == border;
    }
    n = members;
  }
  std::nth_element(work.e, work.e + k - 1, work.e + n, Descending());
  return work.e[k - 1];
}

// Keeps the k largest of work.x[0:n] and all ties of the k-th, in order; returns how many, and the k-th.
template <typename C> static int64_t shrink(int64_t n, int64_t k, const Scratch<C>& work, C* kth) {
  std::memcpy(work.e, work.x, size_t(n) * sizeof(C));
  const C least = *kth = kth_largest<C>(n, k, work);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    work.x[kept] = work.x[i];
    work.index[kept] = work.index[i];
    kept += work.x[i] >= least;
  }
  return kept;
}

// The k largest finite logits and all ties of the k-th; returns how many, -1 on NaN.
template <typename S, typename C>
static int64_t load_top_k(const S* row, int64_t vocab, int64_t k, const Scratch<C>& work) {
  constexpr int64_t L = lanes<C>;
  C least = -kLargest<C>;  // what is below it can no longer be among the k
  int64_t n = 0, limit = 2 * k + 256, i = 0;
  const auto push = [&](int64_t at) {
    const C x = Storage<S>::widen(row[at]);
    work.x[n] = x;
    work.index[n++] = int32_t(at);
    return x == x;
  };
  const auto push_lanes = [&](int64_t at, uint32_t mask) {
    bool number = true;
    for (; mask != 0; mask &= mask - 1) number &= push(at + __builtin_ctz(mask));
    return number;
  };
  for (; i + 4 * L <= vocab; i += 4 * L) {
    prefetch_next_block<C>(row + i);
    // "Not below" rather than "above", to catch NaN too.
    typename Vec<C>::bits hit[4];
    for (int j = 0; j < 4; ++j) hit[j] = ~(Storage<S>::load_wide(row + i + j * L) < least);
    if (lane_mask((hit[0] | hit[1]) | (hit[2] | hit[3])) == 0) continue;
    for (int j = 0; j < 4; ++j) {
      if (!push_lanes(i + j * L, lane_mask(hit[j]))) return -1;
    }
    if (n >= limit) {
      n = shrink<C>(n, k, work, &least);
      limit = 2 * n + 256;
    }
  }
  for (; i < vocab; ++i) {
    if (!(Storage<S>::widen(row[i]) < least) && !push(i)) return -1;
  }
  return n > k ? shrink<C>(n, k, work, &least) : n;
}

// ---- then filter them further ----

// Finds the cut-off of the most likely tokens whose mass reaches top_p: all above the returned logit stay, and so do
// those equal to it unless their exp in work.e was set to 0 here. work.e holds exp((x - top) * scale) for work.x[0:n].
template <typename C>
static C nucleus_border(int64_t n, C top, C bottom, C scale, double top_p, double slack, const Scratch<C>& work) {
  constexpr int64_t L = lanes<C>;
  // Tokens below -cut are dropped however many they are: n exp(-cut) < 1 - top_p, and the top alone has mass 1.
  const double cut = __builtin_log(double(n) / (1 - top_p)) + 1;
  double range = double(top - bottom) * double(scale);
  range = range < cut ? range : cut;
  const C per_bin = C(kBins / (range > 1e-30 ? range : 1e-30));
  for (int64_t b = 0; b <= kBins; ++b) work.histogram[b] = 0;
  bins_below<C>(work.x, n, top, scale, per_bin, work);
  for (int64_t i = 0; i < n; ++i) work.histogram[work.bin[i]] += double(work.e[i]);
  double total = 0;  // in the order of the search below, so that it reaches the target
  for (int64_t b = 0; b <= kBins; ++b) total += work.histogram[b];
  const double target = top_p * total * (1 - slack);
  int64_t border = 0;
  double before = 0;
  while (border < kBins && before + work.histogram[border] < target) before += work.histogram[border++];
  int64_t count = 0;
  const auto wanted = __builtin_convertvector(splat<C>(C(border)), typename Vec<C>::bits);
  for (int64_t i = 0; i < n; i += L) {
    typename Vec<C>::bits bin;
    std::memcpy(&bin, work.bin + i, sizeof(bin));
    for (uint32_t mask = lane_mask(bin == wanted); mask != 0; mask &= mask - 1) {
      const int64_t k = i + __builtin_ctz(mask);
      if (k < n) work.members[count++] = {work.x[k], int32_t(k)};
    }
  }
  struct LikelyFirst {
    bool operator()(const Member<C>& a, const Member<C>& b) const {
      return a.x != b.x ? a.x > b.x : a.position > b.position;
    }
  };
  std::sort(work.members, work.members + count, LikelyFirst());
  int64_t kept = 0;
  while (kept < count && (before < target || kept == 0)) before += double(work.e[work.members[kept++].position]);
  const C least = work.members[kept - 1].x;
  for (int64_t i = kept; i < count && work.members[i].x == least; ++i) work.e[work.members[i].position] = 0;
  return least;
}

// Draws from work.x[0:n], token work.index[i] each (i itself where not `indexed`).
template <typename C>
static Draw<C> draw_from_some(int64_t n, bool indexed, C scale, const SampleOptions& o, double slack, double u,
                              const Scratch<C>& work) {
  constexpr int64_t L = lanes<C>;
  const int64_t full = padded(n, 4 * L);
  for (int64_t i = n; i < full; ++i) work.x[i] = -kInfinity<C>;
  const C top = block_max<C>(work.x, full);
  if (n == 0 || is_neg_inf(top) || !(top <= kLargest<C>)) return kNothing<C>;
  const C lowest_d = o.min_p > 0 ? C(__builtin_log(o.min_p) - 2 * slack) : -kInfinity<C>;
  vec<C> least = splat<C>(kLargest<C>);
  for (int64_t i = 0; i < full; i += L) {
    const vec<C> x = load<C>(work.x + i);
    least = ((x < least) & (x >= -kLargest<C>)) ? x : least;
    store<C>(work.e + i, exp_nonpositive((x - top) * scale));
  }
  C lowest_x = -kInfinity<C>;
  if (o.top_p < 1) {
    C bottom = least[0];
    for (int i = 1; i < L; ++i) bottom = least[i] < bottom ? least[i] : bottom;
    lowest_x = nucleus_border<C>(n, top, bottom, scale, o.top_p, slack, work);
  }
  const int64_t blocks = (full + kBlock - 1) / kBlock;
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    vec<C> sum = {};
    const int64_t end = (b + 1) * kBlock < full ? (b + 1) * kBlock : full;
    for (int64_t i = b * kBlock; i < end; i += L) {
      const vec<C> x = load<C>(work.x + i), e = load<C>(work.e + i);
      const vec<C> kept = ((x >= lowest_x) & ((x - top) * scale >= lowest_d)) ? e : vec<C>{};
      store<C>(work.e + i, kept);
      sum += kept;
    }
    total += work.mass[b] = double(reduce_add<C>(sum));
  }
  double target = u * total;
  const int64_t chosen = pick_block(work.mass, blocks, target), start = chosen * kBlock;
  const int64_t at = start + pick<C>(work.e + start, full - start < kBlock ? full - start : kBlock, target);
  return {indexed ? work.index[at] : at, C(double((work.x[at] - top) * scale) - __builtin_log(total))};
}

template <typename S, typename C>
static Draw<C> draw(const S* row, int64_t vocab, const SampleOptions& o, uint64_t stream, uint64_t offset,
                    const Scratch<C>& work) {
  if (o.temperature == 0) return largest<S, C>(row, vocab);
  const double inverse = 1 / o.temperature, most = double(kLargest<C>), least = double(kSmallest<C>);
  const C scale = C(inverse < most ? (inverse > least ? inverse : least) : most);
  const double u = philox_uniform(o.seed, stream, offset);
  if (o.top_k > 0 && o.top_k < vocab) {
    const int64_t n = load_top_k<S, C>(row, vocab, o.top_k, work);
    return n < 0 ? kNothing<C> : draw_from_some<C>(n, true, scale, o, kSlack<S>, u, work);
  }
  if (o.top_p >= 1 && o.min_p <= 0) return draw_from_all<S, C>(row, vocab, scale, u, work);
  return load_all<S, C>(row, vocab, work) ? draw_from_some<C>(vocab, false, scale, o, kSlack<S>, u, work) : kNothing<C>;
}

template <typename S>
static bool sample(int64_t* ids, void* log_probs, const Rows& logits, const SampleOptions& options, int threads) {
  using C = typename Storage<S>::C;
  bool enough = true;
  if (threads > logits.count) threads = int(logits.count);
#pragma omp parallel num_threads(threads) reduction(&& : enough)
  {
    const Scratch<C> work(logits.vocab);
    enough = work.memory != nullptr;
#pragma omp for schedule(dynamic, 4)
    for (int64_t r = 0; r < logits.count; ++r) {
      if (!enough) continue;
      const int64_t* counter = options.rows != nullptr ? options.rows + r * options.rows_width : nullptr;
      const uint64_t stream = uint64_t(counter != nullptr ? counter[0] : r);
      const uint64_t step = counter != nullptr && options.rows_width == 2 ? uint64_t(counter[1]) : 0;
      const Draw<C> drawn = draw<S, C>(logits.row<S>(r), logits.vocab, options, stream, options.offset + step, work);
      ids[r] = drawn.id;
      static_cast<C*>(log_probs)[r] = drawn.log_prob;
    }
  }
  return enough;
}

bool sample_tokens(int64_t* ids, void* log_probs, const Rows& logits, const SampleOptions& options, int threads) {
  if (logits.count == 0) return true;
  bool enough = true;
  FASTALIGN_SWITCH(logits.dtype, S, enough = sample<S>(ids, log_probs, logits, options, threads))
  return enough;
}

}  // namespace fastalign::FASTALIGN_LEVEL
