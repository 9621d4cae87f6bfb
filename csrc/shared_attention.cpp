// The attention of a decoding step. The queries of all rows of a prompt meet its keys together, as a matrix product in
// tiles of registers, with an online softmax between it and the product with the values (Dao et al. 2022, arXiv
// 2205.14135); each row then goes on over its own tokens. Sums in float32. Built once per level.
#include "shared_attention.h"

#include <cstdlib>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr int64_t kL = lanes<float>;
constexpr int64_t kKeys = 64;      // of the prompt at once: their tile stays in the first cache
constexpr int64_t kQueries = 48;   // about as many meet each tile
constexpr int kRows = 6;           // of queries in registers,
constexpr int kVectors = kVectorBytes == 64 ? 4 : 2;  // by so many vectors
constexpr float kNegInf = -__builtin_inff();

static inline int64_t round_up(int64_t n) { return (n + kL - 1) / kL * kL; }

// ---- products of small tiles ----

// c (R, V vectors) = or += a (R, k) b (k, V vectors)
template <int R, int V, bool Add>
static inline void tile(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k) {
  vec<float> sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = Add ? load<float>(c + r * ldc + v * kL) : vec<float>{};
  }
  for (int64_t t = 0; t < k; ++t) {
    vec<float> y[V];
    for (int v = 0; v < V; ++v) y[v] = load<float>(b + t * ldb + v * kL);
    for (int r = 0; r < R; ++r) {
      const vec<float> x = splat<float>(a[r * lda + t]);
      for (int v = 0; v < V; ++v) sum[r][v] += x * y[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store<float>(c + r * ldc + v * kL, sum[r][v]);
  }
}

template <int R, bool Add>
static void product(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, int64_t n) {
  int64_t j = 0;
  for (; j + kVectors * kL <= n; j += kVectors * kL) tile<R, kVectors, Add>(c + j, ldc, a, lda, b + j, ldb, k);
  for (; j < n; j += kL) tile<R, 1, Add>(c + j, ldc, a, lda, b + j, ldb, k);
}

template <int R> struct Count { static constexpr int value = R; };

// f(Count<rows>()), for 1 <= rows <= kRows
template <typename F> static inline void with_count(int64_t rows, const F& f) {
  static_assert(kRows == 6);
  switch (rows) {
    case 1: return f(Count<1>());
    case 2: return f(Count<2>());
    case 3: return f(Count<3>());
    case 4: return f(Count<4>());
    case 5: return f(Count<5>());
    default: return f(Count<6>());
  }
}

// c (rows <= kRows, n) = or += a (rows, k) b (k, n), for n a multiple of the lanes
template <bool Add>
static void product(int64_t rows, float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k,
                    int64_t n) {
  with_count(rows, [&](auto count) { product<count.value, Add>(c, ldc, a, lda, b, ldb, k, n); });
}

// n numbers as float32, and zeros up to whole vectors
template <typename S> static inline void widen(float* to, const S* from, int64_t n) {
  int64_t i = 0;
  for (; i + kL <= n; i += kL) store<float>(to + i, Storage<S>::load_wide(from + i));
  if (i == n) return;
  store<float>(to + i, vec<float>{});
  for (; i < n; ++i) to[i] = Storage<S>::widen(from[i]);
}

template <typename S> static inline void narrow(S* to, const float* from, float by, int64_t n) {
  int64_t i = 0;
  for (; i + kL <= n; i += kL) Storage<S>::store_narrow(to + i, load<float>(from + i) * by);
  for (; i < n; ++i) to[i] = Storage<S>::narrow(from[i] * by);
}

static inline void scale(float* x, float by, int64_t n) {  // n in whole vectors
  for (int64_t j = 0; j < n; j += kL) store<float>(x + j, load<float>(x + j) * by);
}

// ---- softmax, block by block ----

struct Softmax {
  float top = kNegInf, mass = 0;  // the largest score so far, and the sum of exp(score - top)
};

// Takes in n scores, in whole vectors with -inf behind them: they become exp(score - top), and `sum` (width) is rescaled.
static inline void take(Softmax& so_far, float* scores, int64_t n, float* sum, int64_t width, float softcap) {
  vec<float> m = splat<float>(kNegInf);
  for (int64_t i = 0; i < n; i += kL) {
    vec<float> x = load<float>(scores + i);
    if (softcap != 0) {
      x = x == kNegInf ? x : softcap * tanh<float>(x / softcap);
      store<float>(scores + i, x);
    }
    m = max<float>(m, x);
  }
  const float highest = reduce_max<float>(m), top = highest > so_far.top ? highest : so_far.top;
  const float shift = top == kNegInf ? 0.0f : top;  // nothing visible yet
  vec<float> total = {};
  for (int64_t i = 0; i < n; i += kL) {
    const vec<float> x = load<float>(scores + i) - shift;
    const vec<float> p = x == kNegInf ? vec<float>{} : exp_nonpositive(x);
    store<float>(scores + i, p);
    total += p;
  }
  if (top != so_far.top) {
    const float before = so_far.top == kNegInf ? 0.0f : exp(so_far.top - top);
    if (so_far.mass != 0) scale(sum, before, width);
    so_far.mass *= before;
    so_far.top = top;
  }
  so_far.mass += reduce_add<float>(total);
}

// ---- one head of some rows of one prompt ----

struct Scratch {
  float *query, *sum, *keys, *values, *scores;
  Softmax* so_far;

  static int64_t size(const SharedAttention& in, int64_t queries) {
    const int64_t d = round_up(in.d), dv = round_up(in.dv);
    return queries * (d + dv) + d * kKeys + kKeys * dv + kRows * kKeys + 2 * queries;
  }
  Scratch(float* at, const SharedAttention& in, int64_t queries) {
    const int64_t d = round_up(in.d), dv = round_up(in.dv);
    query = at, sum = query + queries * d, keys = sum + queries * dv, values = keys + d * kKeys;
    scores = values + kKeys * dv, so_far = reinterpret_cast<Softmax*>(scores + kRows * kKeys);
  }
};

// The first own token, or the first of the prompt, that a row's new token sees.
static inline int64_t first_visible(const SharedAttention& in, int64_t before) {
  const int64_t first = before - in.window + 1;
  return in.window == 0 || first < 0 ? 0 : first;
}

template <typename S>
static void over_prompt(const SharedAttention& in, const SharedPrompt& prompt, const int64_t* rows, int64_t count, int64_t head,
                        const Scratch& s) {
  const int64_t d = round_up(in.d), dv = round_up(in.dv), queries = count * in.group;
  const S* const keys = static_cast<const S*>(prompt.keys) + head * in.d * prompt.length;
  const S* const values = static_cast<const S*>(prompt.values) + head * prompt.length * in.dv;
  int64_t begin = prompt.length;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = first_visible(in, prompt.length + in.lengths[rows[i]]);
    begin = first < begin ? first : begin;
  }
  for (begin = begin / kKeys * kKeys; begin < prompt.length; begin += kKeys) {
    const int64_t n = prompt.length - begin < kKeys ? prompt.length - begin : kKeys, wide = round_up(n);
    for (int64_t j = 0; j < in.d; ++j) widen(s.keys + j * kKeys, keys + j * prompt.length + begin, n);
    for (int64_t t = 0; t < n; ++t) widen(s.values + t * dv, values + (begin + t) * in.dv, in.dv);
    for (int64_t q = 0; q < queries; q += kRows) {
      const int64_t some = queries - q < kRows ? queries - q : kRows;
      product<false>(some, s.scores, kKeys, s.query + q * d, d, s.keys, kKeys, in.d, wide);
      for (int64_t r = 0; r < some; ++r) {
        float* const scores = s.scores + r * kKeys;
        const int64_t hidden = first_visible(in, prompt.length + in.lengths[rows[(q + r) / in.group]]) - begin;
        for (int64_t t = 0; t < hidden && t < n; ++t) scores[t] = kNegInf;
        for (int64_t t = n; t < wide; ++t) scores[t] = kNegInf;
        take(s.so_far[q + r], scores, wide, s.sum + (q + r) * dv, dv, in.softcap);
      }
      product<true>(some, s.sum + q * dv, dv, s.scores, kKeys, s.values, dv, n, dv);
    }
  }
}

// scores (R, kKeys): of R queries with n keys of a row
template <int R, typename S>
static inline void dots(float* scores, const float* query, int64_t ldq, const S* keys, int64_t n, int64_t d) {
  const int64_t whole = d / kL * kL;
  for (int64_t t = 0; t < n; ++t, keys += d) {
    vec<float> sum[R] = {};
    for (int64_t j = 0; j < whole; j += kL) {
      const vec<float> key = Storage<S>::load_wide(keys + j);
      for (int r = 0; r < R; ++r) sum[r] += load<float>(query + r * ldq + j) * key;
    }
    for (int r = 0; r < R; ++r) {
      float total = reduce_add<float>(sum[r]);
      for (int64_t j = whole; j < d; ++j) total += query[r * ldq + j] * Storage<S>::widen(keys[j]);
      scores[r * kKeys + t] = total;
    }
  }
}

// The group's queries of one row, from the first-th, and its own tokens.
template <typename S>
static void over_own(const SharedAttention& in, int64_t row, int64_t head, int64_t first, const Scratch& s) {
  const int64_t d = round_up(in.d), dv = round_up(in.dv), end = in.lengths[row] + 1, place = (row * in.kv + head) * in.room;
  const S* const keys = static_cast<const S*>(in.keys) + place * in.d;
  const S* const values = static_cast<const S*>(in.values) + place * in.dv;
  for (int64_t begin = first_visible(in, end - 1); begin < end; begin += kKeys) {
    const int64_t n = end - begin < kKeys ? end - begin : kKeys, wide = round_up(n);
    for (int64_t t = 0; t < n; ++t) widen(s.values + t * dv, values + (begin + t) * in.dv, in.dv);
    for (int64_t g = 0; g < in.group; g += kRows) {
      const int64_t some = in.group - g < kRows ? in.group - g : kRows, q = first + g;
      with_count(some, [&](auto count) { dots<count.value>(s.scores, s.query + q * d, d, keys + begin * in.d, n, in.d); });
      for (int64_t r = 0; r < some; ++r) {
        for (int64_t t = n; t < wide; ++t) s.scores[r * kKeys + t] = kNegInf;
        take(s.so_far[q + r], s.scores + r * kKeys, wide, s.sum + (q + r) * dv, dv, in.softcap);
      }
      product<true>(some, s.sum + q * dv, dv, s.scores, kKeys, s.values, dv, n, dv);
    }
  }
}

// Asks for a row's own tokens before they are needed: they come from memory, and each row's lie apart.
template <typename S> static inline void prefetch_own(const SharedAttention& in, int64_t row, int64_t head) {
  const int64_t end = in.lengths[row] + 1, place = (row * in.kv + head) * in.room, first = first_visible(in, end - 1);
  const char* const keys = reinterpret_cast<const char*>(static_cast<const S*>(in.keys) + (place + first) * in.d);
  const char* const values = reinterpret_cast<const char*>(static_cast<const S*>(in.values) + (place + first) * in.dv);
  for (int64_t i = 0; i < (end - first) * in.d * int64_t(sizeof(S)); i += 64) __builtin_prefetch(keys + i);
  for (int64_t i = 0; i < (end - first) * in.dv * int64_t(sizeof(S)); i += 64) __builtin_prefetch(values + i);
}

template <typename S>
static void attend(const SharedAttention& in, const SharedPrompt& prompt, const int64_t* rows, int64_t count, int64_t head,
                   const Scratch& s) {
  const int64_t d = round_up(in.d), dv = round_up(in.dv), heads = in.kv * in.group;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t of = rows[i] * in.kv + head, at = of * in.room + in.lengths[rows[i]];
    __builtin_memcpy(static_cast<S*>(in.keys) + at * in.d, in.key.row<S>(of), size_t(in.d) * sizeof(S));
    __builtin_memcpy(static_cast<S*>(in.values) + at * in.dv, in.value.row<S>(of), size_t(in.dv) * sizeof(S));
    for (int64_t g = 0; g < in.group; ++g) {
      const int64_t q = i * in.group + g;
      widen(s.query + q * d, in.query.row<S>(rows[i] * heads + head * in.group + g), in.d);
      scale(s.query + q * d, in.scaling, d);
      for (int64_t j = 0; j < dv; ++j) s.sum[q * dv + j] = 0;
      s.so_far[q] = Softmax();
    }
  }
  over_prompt<S>(in, prompt, rows, count, head, s);
  for (int64_t i = 0; i < count; ++i) {
    if (i + 1 < count) prefetch_own<S>(in, rows[i + 1], head);
    over_own<S>(in, rows[i], head, i * in.group, s);
    S* const to = static_cast<S*>(in.out) + (rows[i] * heads + head * in.group) * in.dv;
    for (int64_t g = 0; g < in.group; ++g) {
      const int64_t q = i * in.group + g;
      narrow(to + g * in.dv, s.sum + q * dv, 1.0f / s.so_far[q].mass, in.dv);
    }
  }
}

template <typename S> static void all(const SharedAttention& in, int threads) {
  const int64_t at_once = in.group < kQueries ? kQueries / in.group : 1, size = Scratch::size(in, at_once * in.group);
  int64_t parts = 0;
  for (int64_t p = 0; p < in.prompt_count; ++p) parts += (in.prompts[p].count + at_once - 1) / at_once;
  float* const memory = static_cast<float*>(std::malloc(size_t(threads) * size_t(size) * sizeof(float)));
  if (memory == nullptr) throw std::bad_alloc();
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    const int thread = omp_get_thread_num();
#else
    const int thread = 0;
#endif
    const Scratch scratch(memory + thread * size, in, at_once * in.group);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < parts * in.kv; ++task) {
      int64_t part = task / in.kv, p = 0;
      for (int64_t own; part >= (own = (in.prompts[p].count + at_once - 1) / at_once); ++p) part -= own;
      const SharedPrompt& prompt = in.prompts[p];
      const int64_t begin = part * at_once, left = prompt.count - begin;
      attend<S>(in, prompt, in.order + prompt.first + begin, left < at_once ? left : at_once, task % in.kv, scratch);
    }
  }
  std::free(memory);
}

void shared_attention(const SharedAttention& in, int threads) {
  FASTALIGN_SWITCH_FLOAT(in.query.dtype, S, all<S>(in, threads))
}

}  // namespace fastalign::FASTALIGN_LEVEL
