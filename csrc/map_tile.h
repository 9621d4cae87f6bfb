// A tile of rewards transposed into columns, and the sums of a tilted distribution over it: scores, their exp relative
// to a maximum, and the Gram matrix of (1, x_1 .. x_m) under those weights. Included by the per-level files alone (see
// isa.h).
#pragma once

#include <cstdlib>
#include <type_traits>

#include "map_statistics.h"
#include "simd.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr double kInf = __builtin_inf();
constexpr int64_t kLanes = lanes<double>;
// Up to this many values, the Gram matrix stays in registers while a tile is read once.
#if defined(__AVX512F__)
constexpr int kInRegisters = 6;
#else
constexpr int kInRegisters = 3;
#endif

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }
inline int64_t triangle(int64_t m) { return m * (m + 1) / 2; }

// Zeroed and aligned to a cache line: a vector that crosses a line costs two reads.
template <typename T> T* allocate_zeros(int64_t count) {
  const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
  void* memory = std::aligned_alloc(64, bytes);
  std::memset(memory, 0, bytes);
  return static_cast<T*>(memory);
}

// Sums of one lambda over some rows, e = w exp(s - shift): the shift, the largest score s of a row with w > 0, and in N
// lanes, to be added up at the end, sum e^2, sum e (1, x), and the upper triangle of sum e x x^T row by row.
template <int64_t N> struct Sums {
  double *shift, *top, *squares, *first, *gram;
  static int64_t size(int64_t m) { return (N * (2 + m + triangle(m)) + 2 + 7) / 8 * 8; }
  Sums(double* at, int64_t m)
      : shift(at + N * (2 + m + triangle(m))), top(shift + 1), squares(at), first(at + N), gram(first + N * (m + 1)) {}
  void clear() const {
    *shift = *top = -kInf;
    for (double* at = squares; at < shift; ++at) *at = 0;
  }
  void rescale(double factor) const {
    for (int64_t i = 0; i < N; ++i) squares[i] *= factor * factor;
    for (double* at = first; at < shift; ++at) *at *= factor;
  }
};
using Partial = Sums<kLanes>;
using Total = Sums<1>;

inline double add_lanes(const double* p) {
  typedef double quad __attribute__((vector_size(32), aligned(8), may_alias));
  if constexpr (kLanes == 2) return p[0] + p[1];
  quad q = *reinterpret_cast<const quad*>(p);
  if constexpr (kLanes == 8) q += *reinterpret_cast<const quad*>(p + 4);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

inline void add_up(const Total& total, const Partial& partial) {
  *total.shift = *partial.shift;
  *total.top = *partial.top;
  for (int64_t i = 0; total.squares + i < total.shift; ++i) total.squares[i] = add_lanes(partial.squares + i * kLanes);
}

inline double largest(vec<double> x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_pd((__m512d)x);
#else
  return reduce_max<double>(x);
#endif
}

// exp(from - to) for shifts that may both be -inf (nothing summed yet)
inline double rescale(double from, double to) { return from == to ? 1.0 : exp(from - to); }

inline void merge(const Total& into, const Total& from) {
  if (*from.top > *into.top) *into.top = *from.top;
  double factor = 1.0;
  if (*from.shift > *into.shift) {
    into.rescale(rescale(*into.shift, *from.shift));
    *into.shift = *from.shift;
  } else {
    factor = rescale(*from.shift, *into.shift);
  }
  *into.squares += *from.squares * factor * factor;
  for (int64_t i = 0; into.first + i < into.shift; ++i) into.first[i] += from.first[i] * factor;
}

// Columns of rows less a center, each group filled up to whole vectors with rows of zeros and log weight -inf.
struct Tile {
  int64_t width, padded = 0;  // room for rows, and how many are in use
  double *columns, *log_weights, *scores;

  // As many rows as fit in the first-level cache: every tile begins with a maximum that all its lanes wait for.
  static int64_t width_for(int64_t m) {
    int64_t width = 1024;
    while (width > 64 && (m + 3) * width * int64_t(sizeof(double)) > 32768) width /= 2;
    return width;
  }
  static int64_t size(int64_t m) { return (m + 2) * width_for(m); }
  Tile(double* memory, int64_t m)
      : width(width_for(m)), columns(memory), log_weights(memory + m * width), scores(log_weights + width) {}
  double* column(int64_t j) const { return columns + j * width; }
};

template <typename S> inline const S* row_of(const MapInput& in, int64_t i) {
  return static_cast<const S*>(in.rewards) + (in.order != nullptr ? in.order[i] : i) * in.row_stride;
}

// ---- four rows and four columns at a time: one strided store per element would cost more than the arithmetic ----

typedef double quad __attribute__((vector_size(32)));
typedef double unaligned_quad __attribute__((vector_size(32), aligned(8), may_alias));

inline quad widen4(const double* p) { return *reinterpret_cast<const unaligned_quad*>(p); }
inline quad widen4(const float* p) {
#if defined(__AVX__)
  return (quad)_mm256_cvtps_pd(_mm_loadu_ps(p));  // GCC 12 makes two halves of __builtin_convertvector
#else
  return quad{p[0], p[1], p[2], p[3]};
#endif
}

template <int A, int B, int C, int D> inline quad shuffle4(quad x, quad y) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, A, B, C, D);
#else
  typedef int64_t pick __attribute__((vector_size(32)));
  return __builtin_shuffle(x, y, pick{A, B, C, D});
#endif
}

template <typename S>
inline void transpose_4x4(double* columns, int64_t width, const S* const rows[4], quad center, int64_t kept) {
  quad r[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) r[k] = widen4(rows[k]) - center;
  const quad even01 = shuffle4<0, 4, 2, 6>(r[0], r[1]), odd01 = shuffle4<1, 5, 3, 7>(r[0], r[1]);
  const quad even23 = shuffle4<0, 4, 2, 6>(r[2], r[3]), odd23 = shuffle4<1, 5, 3, 7>(r[2], r[3]);
  const auto put = [&](int64_t j, quad x) {
    if (j < kept) *reinterpret_cast<unaligned_quad*>(columns + j * width) = x;
  };
  put(0, shuffle4<0, 1, 4, 5>(even01, even23));
  put(1, shuffle4<0, 1, 4, 5>(odd01, odd23));
  put(2, shuffle4<2, 3, 6, 7>(even01, even23));
  put(3, shuffle4<2, 3, 6, 7>(odd01, odd23));
}

// f(std::integral_constant<int, m>()) for small m, so that it is a compile-time constant; otherwise f of 0
template <int Most = 8, typename F> inline void with_values(int64_t m, const F& f) {
  if constexpr (Most > 0) {
    if (m != Most) return with_values<Most - 1>(m, f);
  }
  f(std::integral_constant<int, Most>());
}

#if defined(__AVX512F__)
// Lane l of the p-th vector that `transpose_packed` makes: in which of the packed values it lies.
template <int M> constexpr int packed_place(int p, int l) {
  const int second = 2 * p + 1 < M ? 2 * p + 1 : 2 * p;
  return l < 8 ? l * M + 2 * p : (l - 8) * M + second;
}
// Where the step that takes in vector `v` (the first two together, v = 1) finds each lane: 16 .. 31 in v itself.
template <int M> struct Picks {
  alignas(64) int32_t at[(M + 1) / 2][4][16];
  constexpr Picks() : at() {
    for (int p = 0; p < (M + 1) / 2; ++p) {
      for (int v = 0; v < 4; ++v) {
        for (int l = 0; l < 16; ++l) {
          const int place = packed_place<M>(p, l);
          at[p][v][l] = v == 1 ? place & 31 : place / 16 == v ? 16 + place % 16 : l;
        }
      }
    }
  }
};

// Columns of eight packed rows of M floats at a time, two of them in a vector: half the shuffles of any other way, for
// they come before the values are widened. Returns how many rows were done.
template <int M>
static int64_t transpose_packed(double* columns, int64_t width, const float* packed, int64_t rows, const double* center) {
  static constexpr Picks<M> picks;
  constexpr int kIn = (M + 1) / 2;
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) {
    const float* from = packed + i * M;
    __m512 in[kIn];
#pragma GCC unroll 4
    for (int v = 0; v < kIn; ++v) {
      // Far enough ahead to hide memory latency; harmless past the end.
      __builtin_prefetch(from + 16 * v + 256 * M);
      in[v] = 2 * v + 1 < M ? _mm512_loadu_ps(from + 16 * v) : _mm512_maskz_loadu_ps(0xff, from + 16 * v);
    }
#pragma GCC unroll 4
    for (int p = 0; p < kIn; ++p) {
      const auto at = [&](int v) { return _mm512_load_si512(picks.at[p][v]); };
      __m512 x;
      if constexpr (kIn == 1) {
        x = M == 2 ? _mm512_permutexvar_ps(_mm512_and_si512(at(0), _mm512_set1_epi32(15)), in[0]) : in[0];
      } else {
        x = _mm512_permutex2var_ps(in[0], at(1), in[1]);
      }
#pragma GCC unroll 4
      for (int v = 2; v < kIn; ++v) x = _mm512_permutex2var_ps(x, at(v), in[v]);
      const auto put = [&](int j, __m256 half) {
        _mm512_storeu_pd(columns + j * width + i, _mm512_sub_pd(_mm512_cvtps_pd(half), _mm512_set1_pd(center[j])));
      };
      put(2 * p, _mm512_castps512_ps256(x));
      if (2 * p + 1 < M) put(2 * p + 1, _mm512_extractf32x8_ps(x, 1));
    }
  }
  return i;
}
#endif

// Appends the rows [begin, end) minus the center.
template <typename S>
static void load_rows(Tile& tile, const MapInput& in, int64_t begin, int64_t end, const double* center) {
  const int64_t m = in.m, width = tile.width, rows = end - begin, filled = whole_vectors(rows);
  double *columns = tile.columns + tile.padded, *log_weights = tile.log_weights + tile.padded;
  tile.padded += filled;
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    if (in.order == nullptr && in.row_stride == m) {
      with_values(m, [&](auto M) {
        if constexpr (M > 0) i = transpose_packed<M>(columns, width, row_of<float>(in, begin), rows, center);
      });
    }
  }
#endif
  // With fewer than four columns, a read past a row reaches into the rows after it; the last rows have none.
  const bool narrow = m < 4;
  quad narrow_center = {};
  for (int64_t j = 0; narrow && j < m; ++j) narrow_center[j] = center[j];
  for (; i + 4 <= rows; i += 4) {
    const S* from[4];
    for (int k = 0; k < 4; ++k) from[k] = row_of<S>(in, begin + i + k);
    // Far enough ahead to hide memory latency; harmless past the end, or with an order.
    __builtin_prefetch(from[0] + 256 * in.row_stride);
    __builtin_prefetch(from[2] + 256 * in.row_stride);
    if (narrow) {
      const S* last = static_cast<const S*>(in.rewards) + (in.n - 4) * in.row_stride;
      if (in.row_stride < m || from[0] > last || from[1] > last || from[2] > last || from[3] > last) break;
      transpose_4x4<S>(columns + i, width, from, narrow_center, m);
      continue;
    }
    for (int64_t j = 0;; j = at_most(j + 4, m - 4)) {  // the last block overlaps the one before
      const S* const at[4] = {from[0] + j, from[1] + j, from[2] + j, from[3] + j};
      transpose_4x4<S>(columns + j * width + i, width, at, widen4(center + j), 4);
      if (j == m - 4) break;
    }
  }
  for (; i < rows; ++i) {
    const S* row = row_of<S>(in, begin + i);
    for (int64_t j = 0; j < m; ++j) columns[j * width + i] = double(row[j]) - center[j];
  }
  for (; i < filled; ++i) {
    for (int64_t j = 0; j < m; ++j) columns[j * width + i] = 0;
  }
  for (i = 0; i < rows; ++i) {
    log_weights[i] = in.log_weights == nullptr ? 0 : in.log_weights[in.order != nullptr ? in.order[begin + i] : begin + i];
  }
  for (; i < filled; ++i) log_weights[i] = -kInf;
}

// ---- sums; M = m if it is a compile-time constant, so that lambda stays in registers, else 0 ----

// scores [begin, end) <- lambda . x + log w; `best` <- the largest of them, `top` <- the largest lambda . x with w > 0.
template <int M>
static void score_rows(double& best, double& top, const Tile& tile, int64_t begin, int64_t end, const double* lambda,
                       int64_t m, bool weighted) {
  const int64_t width = tile.width;
  const vec<double> low = splat<double>(-kInf);
  vec<double> high = low, highest = low, fixed[M > 0 ? M : 1];
#pragma GCC unroll 8
  for (int j = 0; j < M; ++j) fixed[j] = splat<double>(lambda[j]);
  for (int64_t i = begin; i < end; i += kLanes) {
    vec<double> s = {};
    if constexpr (M > 0) {
#pragma GCC unroll 8
      for (int j = 0; j < M; ++j) s += fixed[j] * load<double>(tile.columns + j * width + i);
    } else {
      for (int64_t j = 0; j < m; ++j) s += lambda[j] * load<double>(tile.columns + j * width + i);
    }
    const vec<double> w = load<double>(tile.log_weights + i);
    if (weighted) highest = max<double>(highest, w > low ? s : low);
    s = w > low ? s + w : low;
    store<double>(tile.scores + i, s);
    high = max<double>(high, s);
  }
  best = largest(high);
  top = weighted ? largest(highest) : best;
}

// scores [begin, end) <- e = exp(scores - shift); adds sum e^2 and sum e (1, x)
template <int M>
static void exp_rows(const Partial& sums, const Tile& tile, int64_t begin, int64_t end, double shift, int64_t m) {
  const int64_t width = tile.width;
  vec<double> squares = {}, first[M + 1] = {};
  for (int64_t i = begin; i < end; i += kLanes) {
    const vec<double> e = exp_nonpositive(load<double>(tile.scores + i) - shift);
    squares += e * e;
    first[0] += e;
#pragma GCC unroll 8
    for (int j = 0; j < M; ++j) first[j + 1] += e * load<double>(tile.columns + j * width + i);
    store<double>(tile.scores + i, e);
  }
  const auto add = [](double* at, vec<double> x) { store<double>(at, load<double>(at) + x); };
  add(sums.squares, squares);
#pragma GCC unroll 9
  for (int j = 0; j <= M; ++j) add(sums.first + j * kLanes, first[j]);
  for (int64_t j = 0; M == 0 && j < m; ++j) {
    const double* x = tile.column(j);
    vec<double> sum = {};
    for (int64_t i = begin; i < end; i += kLanes) sum += load<double>(tile.scores + i) * load<double>(x + i);
    add(sums.first + (j + 1) * kLanes, sum);
  }
}

// Rows a .. a + A of the triangle from column b to column b + B: sum over the tile of e x_a x_b, e in the scores
template <int A, int B> static void gram_block(double* gram, const Tile& tile, int64_t m, int64_t a, int64_t b) {
  vec<double> sums[A][B] = {};
  const double *left = tile.column(a), *right = tile.column(b);
  const int64_t width = tile.width;
  for (int64_t i = 0; i < tile.padded; i += kLanes) {
    const vec<double> e = load<double>(tile.scores + i);
    vec<double> x[B];
#pragma GCC unroll 4
    for (int k = 0; k < B; ++k) x[k] = load<double>(right + k * width + i);
#pragma GCC unroll 4
    for (int j = 0; j < A; ++j) {
      const vec<double> y = e * load<double>(left + j * width + i);
#pragma GCC unroll 4
      for (int k = 0; k < B; ++k) sums[j][k] += y * x[k];
    }
  }
  for (int j = 0; j < A; ++j) {
    const int64_t row = a + j, start = row * m - row * (row - 1) / 2 - row;  // of (row, 0), were it stored
    for (int k = 0; k < B; ++k) {
      if (b + k < row) continue;
      double* at = gram + (start + b + k) * kLanes;
      store<double>(at, load<double>(at) + sums[j][k]);
    }
  }
}

// Adds the triangle of the whole tile, the weights e in its scores.
template <int M> static void add_gram(double* gram, const Tile& tile, int64_t m) {
  if constexpr (M > 0 && M <= kInRegisters) {  // every value is read once
    vec<double> sums[M][M] = {};
    for (int64_t i = 0; i < tile.padded; i += kLanes) {
      const vec<double> e = load<double>(tile.scores + i);
      vec<double> x[M];
#pragma GCC unroll 8
      for (int j = 0; j < M; ++j) x[j] = load<double>(tile.columns + j * tile.width + i);
#pragma GCC unroll 8
      for (int j = 0; j < M; ++j) {
        const vec<double> y = e * x[j];
#pragma GCC unroll 8
        for (int k = j; k < M; ++k) sums[j][k] += y * x[k];
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < M; ++j) {
#pragma GCC unroll 8
      for (int k = j; k < M; ++k, gram += kLanes) store<double>(gram, load<double>(gram) + sums[j][k]);
    }
    return;
  }
  for (int64_t a = 0; a < m;) {
    const int64_t left = m - a, rows = left == 4 ? 2 : at_most(left, 3);  // 2 + 2: a single row would wait for each of its additions
    with_values<3>(rows, [&](auto A) {
      for (int64_t b = a; b < m; b += 4) {
        with_values<4>(at_most(m - b, 4), [&](auto B) {
          if constexpr (A > 0 && B > 0) gram_block<A, B>(gram, tile, m, a, b);
        });
      }
    });
    a += rows;
  }
}

}  // namespace fastalign::FASTALIGN_LEVEL
