// Blocks of the base and the models widened into the cache, the base subtracted, elements dropped, the rest merged.
// Built once per level.
#include "soup_tasks.h"

#include "philox.h"
#include "soup_wide.h"

namespace fastalign::FASTALIGN_LEVEL {

template <typename C> struct KeyOf { typedef uint32_t type; };
template <> struct KeyOf<double> { typedef uint64_t type; };
template <typename C> using key_of = typename KeyOf<C>::type;
template <typename C> constexpr key_of<C> kSize = ~(key_of<C>(1) << (8 * sizeof(C) - 1));  // all bits but the sign's

template <typename C> static inline key_of<C> key(const C* p) {
  key_of<C> bits;
  __builtin_memcpy(&bits, p, sizeof(C));
  return bits & kSize<C>;
}

// ---- random numbers ----

constexpr int kWords = 64; // generated together

// Element j's number is word (j % 64) / 16 of Philox4x32-10 with key `seed` and counter (stream, j / 64 * 16 + j % 16).
static void random_words(uint32_t* words, uint64_t seed, uint64_t stream, uint64_t block) {
  constexpr int L = kWords / 4, W = kVectorBytes / 8, V = L / W;
  wide_words c[4][V];
  for (int v = 0; v < V; ++v) {
    for (int l = 0; l < W; ++l) c[2][v][l] = block * L + uint64_t(v * W + l);
    c[0][v] = wide_words{} + stream, c[1][v] = wide_words{} + (stream >> 32), c[3][v] = c[2][v] >> 32;
  }
  philox(c, seed);
  for (int i = 0; i < 4; ++i) {
    for (int v = 0; v < V; ++v) {
      for (int l = 0; l < W; ++l) words[i * L + v * W + l] = uint32_t(c[i][v][l]);
    }
  }
}

// use(words, j, from, to) for elements [from, to) of [0, n), which come from element `first` on: j's word is words[j].
template <typename Use> static inline void with_words(uint64_t seed, uint64_t stream, int64_t first, int64_t n, Use use) {
  uint32_t words[kWords];
  for (int64_t from = 0; from < n;) {
    const int64_t at = first + from, skip = at % kWords;
    const int64_t to = n - from < kWords - skip ? n : from + kWords - skip;
    random_words(words, seed, stream, uint64_t(at / kWords));
    use(words + skip, from, to);
    from = to;
  }
}

// ---- ranks within a row ----

// Memory for the ranks of a row: keys and positions, twice, and the ranks.
template <typename C> static int64_t rank_bytes(int64_t row) {
  return row * (2 * int64_t(sizeof(key_of<C>)) + 3 * int64_t(sizeof(uint32_t))) + 64;
}

// ranks[j] of row elements by magnitude, the smallest 0; among equals the earlier ranks lower. Radix sort from the
// lowest digit.
template <typename C> static const uint32_t* ranks_of(const C* d, int64_t row, void* scratch) {
  typedef key_of<C> K;
  K* keys = static_cast<K*>(scratch);
  K* other_keys = keys + row;
  uint32_t* places = reinterpret_cast<uint32_t*>(other_keys + row);
  uint32_t* other_places = places + row;
  uint32_t* const ranks = other_places + row;
  constexpr int kDigits = 1 << kDigitBits;
  for (int64_t j = 0; j < row; ++j) keys[j] = key<C>(d + j), places[j] = uint32_t(j);
  for (int shift = 0; shift < int(8 * sizeof(C)) - 1; shift += kDigitBits) {
    uint32_t starts[kDigits] = {};
    for (int64_t j = 0; j < row; ++j) ++starts[(keys[j] >> shift) & (kDigits - 1)];
    uint32_t sum = 0;
    for (uint32_t& start : starts) {
      const uint32_t count = start;
      start = sum;
      sum += count;
    }
    for (int64_t j = 0; j < row; ++j) {
      const uint32_t to = starts[(keys[j] >> shift) & (kDigits - 1)]++;
      other_keys[to] = keys[j], other_places[to] = places[j];
    }
    K* const swapped = keys;
    keys = other_keys, other_keys = swapped;
    uint32_t* const moved = places;
    places = other_places, other_places = moved;
  }
  for (int64_t j = 0; j < row; ++j) ranks[places[j]] = uint32_t(j);
  return ranks;
}

// ---- which elements stay ----

// Zeroes the dropped elements of [first, first + n); with own_scale, kept elements are divided by their probability.
template <typename C>
static void drop(C* d, const TaskVector& of, uint64_t seed, int64_t first, int64_t n, void* scratch) {
  constexpr double kRange = 0x1p32;
  if (of.keep == TaskKeep::band) {
    typedef key_of<C> K;
    const auto local = [&](int64_t at) { return int32_t(at <= first ? 0 : at - first > n ? n : at - first); };
    const K low = K(of.low), high = of.high > kSize<C> ? kSize<C> : K(of.high);
    const int32_t low_first = local(of.low_first), low_last = local(of.low_last), high_last = local(of.high_last);
    for (int32_t j = 0; j < int32_t(n); ++j) {
      const K k = key<C>(d + j);
      const bool above = (k > low) | ((k == low) & (j >= low_first) & (j < low_last));
      const bool below = (k < high) | ((k == high) & (j < high_last));
      d[j] = (above & below) ? d[j] : C(0);
    }
  } else if (of.keep == TaskKeep::random) {
    const double stay = __builtin_ceil(of.probability * kRange);  // this many of the 2^32 numbers
    const uint32_t last = stay < 1 ? 0 : uint32_t(stay - 1);
    with_words(seed, of.stream, first, n, [&](const uint32_t* words, int64_t from, int64_t to) {
      C* const x = d + from;
      const int32_t count = int32_t(to - from);
      for (int32_t j = 0; j < count; ++j) x[j] = words[j] <= last ? x[j] : C(0);
    });
  } else if (of.keep == TaskKeep::ranked) {
    const uint32_t* const ranks = ranks_of<C>(d, n, scratch);
    const double least = n > 1 ? of.probability - of.epsilon : of.probability, step = n > 1 ? 2 * of.epsilon / double(n - 1) : 0;
    with_words(seed, of.stream, first, n, [&](const uint32_t* words, int64_t from, int64_t to) {
      for (int64_t j = 0; j < to - from; ++j) {
        const double chance = least + double(ranks[from + j]) * step;
        const C kept = of.own_scale ? C(double(d[from + j]) / chance) : d[from + j];
        d[from + j] = double(words[j]) < chance * kRange ? kept : C(0);
      }
    });
  }
}

// ---- blocks ----

static bool is_ranked(const TaskMerge& merge, int inputs) {
  for (int i = 0; i + 1 < inputs; ++i) {
    if (merge.vectors[i].keep == TaskKeep::ranked) return true;
  }
  return false;
}

// use(wide, first, n) for blocks of at most `most` elements: wide[0] the base, wide[i] input i's difference from it.
template <typename C, typename Use>
static inline void each_block(const void* const* ins, const SoupType* in_types, int inputs, int64_t n, int64_t most,
                              C* buffer, Use use) {
  const int64_t stride = (most + kStep - 1) / kStep * kStep;
  const C* wide[kSoupInputs];
  C* deltas[kSoupInputs];
  for (int64_t first = 0; first < n; first += most) {
    const int64_t count = n - first < most ? n - first : most;
    widen_blocks<C>(buffer, stride, wide, ins, in_types, inputs, first, count);
    for (int i = 0; i < inputs; ++i) deltas[i] = buffer + i * stride;
    for (int i = 1; i < inputs; ++i) {
      for (int64_t j = 0; j < count; ++j) deltas[i][j] -= deltas[0][j];
    }
    use(deltas, first, count);
  }
}

static int64_t block_of(int inputs) { return kBuffer / inputs / kStep * kStep; }

template <typename C> static C* buffer_in(void* scratch) {
  return reinterpret_cast<C*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
}

int64_t soup_task_scratch(const SoupType* in_types, int inputs, int64_t ranked_row) {
  const bool wide = any_wide(in_types, inputs);
  const int64_t block = ranked_row > block_of(inputs) ? ranked_row + kStep : block_of(inputs);
  const int64_t ranks = ranked_row == 0 ? 0 : rank_bytes<double>(ranked_row);
  return block * inputs * (wide ? 8 : 4) + ranks + 128;
}

template <typename C>
static void histogram(uint32_t* counts, const TaskDigit* digits, int count, const void* const* ins,
                      const SoupType* in_types, int inputs, int64_t n, void* scratch) {
  each_block<C>(ins, in_types, inputs, n, block_of(inputs), buffer_in<C>(scratch), [&](C* const* d, int64_t, int64_t m) {
    for (int c = 0; c < count; ++c) {
      const C* const x = d[digits[c].vector + 1];
      const int shift = digits[c].shift;
      const key_of<C> prefix = key_of<C>(digits[c].prefix);
      uint32_t* const bins = counts + int64_t(c) * kTurns * kBins;
      constexpr int kTogether = 64;
      key_of<C> at[kTogether];
      for (int64_t first = 0; first < m; first += kTogether) {
        const int some = int(m - first < kTogether ? m - first : kTogether);
        for (int j = 0; j < some; ++j) {
          const key_of<C> k = key<C>(x + first + j) >> shift;
          at[j] = (k >> kDigitBits) == prefix ? k & (kBins - 2) : key_of<C>(kBins - 1);
        }
        for (int j = some; j % kTurns != 0; ++j) at[j] = kBins - 1;
        for (int j = 0; j < some; j += kTurns) {
          for (int turn = 0; turn < kTurns; ++turn) ++bins[turn * kBins + int(at[j + turn])];
        }
      }
    }
  });
}

template <typename C>
static void ties_of(int64_t* counts, const TaskTie* ties, int count, const void* const* ins, const SoupType* in_types,
                    int inputs, int64_t n, void* scratch) {
  each_block<C>(ins, in_types, inputs, n, block_of(inputs), buffer_in<C>(scratch), [&](C* const* d, int64_t, int64_t m) {
    for (int c = 0; c < count; ++c) {
      const C* const x = d[ties[c].vector + 1];
      const key_of<C> wanted = key_of<C>(ties[c].key);
      int32_t sum = 0;
      for (int64_t j = 0; j < m; ++j) sum += key<C>(x + j) == wanted;
      counts[c] += sum;
    }
  });
}

template <typename C>
static int64_t nth(TaskTie tie, int64_t left, const void* const* ins, const SoupType* in_types, int inputs, int64_t n,
                   void* scratch) {
  int64_t place = n;
  each_block<C>(ins, in_types, inputs, n, block_of(inputs), buffer_in<C>(scratch), [&](C* const* d, int64_t at, int64_t m) {
    const C* const x = d[tie.vector + 1];
    for (int64_t j = 0; j < m && place == n; ++j) {
      if (key<C>(x + j) == key_of<C>(tie.key) && left-- == 0) place = at + j;
    }
  });
  return place;
}

template <typename C>
static void sizes(double* sums, const TaskMerge& merge, const void* const* ins, const SoupType* in_types, int inputs,
                  int64_t first, int64_t n, void* scratch) {
  const int64_t most = is_ranked(merge, inputs) ? merge.row : block_of(inputs);
  C* const buffer = buffer_in<C>(scratch);
  void* const ranks = buffer + (most + kStep) / kStep * kStep * inputs;
  const auto size = [](const C* x, int64_t m) {
    constexpr int W = int(kStep);
    C part[W] = {};
    double total = 0;
    int64_t j = 0;
    for (; j + W <= m; j += W) {
      for (int l = 0; l < W; ++l) part[l] += __builtin_fabs(x[j + l]);
    }
    for (; j < m; ++j) total += __builtin_fabs(double(x[j]));
    for (C p : part) total += double(p);
    return total;
  };
  each_block<C>(ins, in_types, inputs, n, most, buffer, [&](C* const* d, int64_t at, int64_t m) {
    for (int i = 0; i + 1 < inputs; ++i) {
      sums[2 * i] += size(d[i + 1], m);
      drop<C>(d[i + 1], merge.vectors[i], merge.seed, first + at, m, ranks);
      sums[2 * i + 1] += size(d[i + 1], m);
    }
  });
}

// A product rounded on its own, not fused with the following sum: terms that cancel exactly must, because the sign
// matters.
template <typename C> static inline vec<C> rounded(vec<C> x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// One step's elements of one output. coefficients: weight times scale of each vector.
template <typename C, bool kElect>
static inline void merge_step(C* out, C* const* d, int inputs, const C* coefficients, const C* weights, C lambda, C divisor,
                              bool normalize, int64_t j) {
  constexpr int V = int(kStep / lanes<C>);
  vec<C> total[V] = {};
  for (int i = 1; i < inputs; ++i) {
    for (int v = 0; v < V; ++v) total[v] += rounded<C>(coefficients[i - 1] * load<C>(d[i] + j + v * lanes<C>));
  }
  for (int v = 0; v < V; ++v) {
    const vec<C> base = load<C>(d[0] + j + v * lanes<C>);
    vec<C> merged = total[v];
    if constexpr (kElect) {
      const vec<C> zero = {};
      vec<C> sum = zero, taken = zero;
      for (int i = 1; i < inputs; ++i) {
        const vec<C> x = rounded<C>(coefficients[i - 1] * load<C>(d[i] + j + v * lanes<C>));
        const auto with = total[v] >= zero ? x > zero : x < zero;
        sum += with ? x : zero;
        taken += with ? splat<C>(weights[i - 1]) : zero;
      }
      if (normalize) sum /= taken == zero ? zero + 1 : taken;
      merged = total[v] == total[v] ? sum : total[v];  // NaN in, NaN out
    } else if (normalize) {
      merged /= divisor;
    }
    store<C>(out + v * lanes<C>, base + lambda * merged);
  }
}

template <typename S, typename C>
static void merge_span(void* const* outs, int outputs, const TaskMerge& merge, const void* const* ins,
                       const SoupType* in_types, int inputs, int64_t first, int64_t n, void* scratch) {
  const int64_t most = is_ranked(merge, inputs) ? merge.row : block_of(inputs);
  C* const buffer = buffer_in<C>(scratch);
  void* const ranks = buffer + (most + kStep) / kStep * kStep * inputs;
  const int vectors = inputs - 1;
  alignas(64) C sums[kStep], weights[kSoupInputs], coefficients[kSoupInputs];
  each_block<C>(ins, in_types, inputs, n, most, buffer, [&](C* const* d, int64_t at, int64_t m) {
    for (int i = 0; i < vectors; ++i) drop<C>(d[i + 1], merge.vectors[i], merge.seed, first + at, m, ranks);
    for (int k = 0; k < outputs; ++k) {
      double divisor = 0;
      for (int i = 0; i < vectors; ++i) {
        const double weight = merge.weights[int64_t(k) * vectors + i];
        weights[i] = C(weight), coefficients[i] = C(weight * merge.vectors[i].scale);
        divisor += weight;
      }
      if (divisor < 1e-8 && divisor > -1e-8) divisor = 1;
      S* const out = static_cast<S*>(outs[k]) + at;
      for (int64_t j = 0; j < m; j += kStep) {
        const auto step = merge.elect ? merge_step<C, true> : merge_step<C, false>;
        step(sums, d, inputs, coefficients, weights, C(merge.lambda), C(divisor), merge.normalize, j);
        narrow_vectors<S, C>(out + j, sums, m - j < kStep ? m - j : kStep);
      }
    }
  });
}

#define FASTALIGN_WIDE(f, ...) (any_wide(in_types, inputs) ? f<double>(__VA_ARGS__) : f<float>(__VA_ARGS__))

void soup_task_histogram(uint32_t* counts, const TaskDigit* digits, int count, const void* const* ins,
                         const SoupType* in_types, int inputs, int64_t n, void* scratch) {
  FASTALIGN_WIDE(histogram, counts, digits, count, ins, in_types, inputs, n, scratch);
}

void soup_task_ties(int64_t* counts, const TaskTie* ties, int count, const void* const* ins, const SoupType* in_types,
                    int inputs, int64_t n, void* scratch) {
  FASTALIGN_WIDE(ties_of, counts, ties, count, ins, in_types, inputs, n, scratch);
}

int64_t soup_task_nth(TaskTie tie, int64_t left, const void* const* ins, const SoupType* in_types, int inputs, int64_t n,
                      void* scratch) {
  return FASTALIGN_WIDE(nth, tie, left, ins, in_types, inputs, n, scratch);
}

void soup_task_sizes(double* sums, const TaskMerge& merge, const void* const* ins, const SoupType* in_types, int inputs,
                     int64_t first, int64_t n, void* scratch) {
  FASTALIGN_WIDE(sizes, sums, merge, ins, in_types, inputs, first, n, scratch);
}

void soup_task_span(void* const* outs, SoupType out_type, int outputs, const TaskMerge& merge, const void* const* ins,
                    const SoupType* in_types, int inputs, int64_t first, int64_t n, void* scratch) {
  const bool wide = any_wide(in_types, inputs);
#define FASTALIGN_SPAN(S)                                                                            \
  wide ? merge_span<S, double>(outs, outputs, merge, ins, in_types, inputs, first, n, scratch)       \
       : merge_span<S, float>(outs, outputs, merge, ins, in_types, inputs, first, n, scratch);       \
  break
  switch (out_type) {
    case SoupType::float64: FASTALIGN_SPAN(double);
    case SoupType::float32: FASTALIGN_SPAN(float);
    case SoupType::bfloat16: FASTALIGN_SPAN(bfloat16);
    case SoupType::float16: FASTALIGN_SPAN(float16);
    case SoupType::float8_e4m3fn: FASTALIGN_SPAN(float8_e4m3fn);
    case SoupType::float8_e5m2: FASTALIGN_SPAN(float8_e5m2);
  }
#undef FASTALIGN_SPAN
}

}  // namespace fastalign::FASTALIGN_LEVEL
