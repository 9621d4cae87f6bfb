// A tile of rewards turned into columns, and the sums of the tilted laws over it: scores, their exp about a running
// maximum, and the Gram matrix of (1, x_1 .. x_m) under those weights. In C = double, or in C = float where digits are
// not needed yet. Included by the per-level files alone (see isa.h).
#pragma once

#include <cstdlib>

#include "map_statistics.h"
#include "simd.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr double kInf = __builtin_inf();
// Rows of the units whose partial sums are merged in order; it fixes the rounding, so it depends on nothing.
constexpr int64_t kChunkRows = 4096;
// So many values have a Gram matrix that stays in registers while a tile is read once.
#if defined(__AVX512F__)
constexpr int kInRegisters = 6;
#else
constexpr int kInRegisters = 3;
#endif

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline double clip(double x, double low, double high) { return x < low ? low : x > high ? high : x; }
inline int64_t triangle(int64_t m) { return (m + 1) * (m + 2) / 2; }

// Sums of one lambda over some rows: the shift, the largest score, sum e^2, and the upper triangle of
// sum e (1, x)(1, x)^T row by row, e = w exp(s - shift); the last two in N lanes, to be added up at the end.
template <typename C, int64_t N> struct Sums {
  C *shift, *top, *squares, *gram;
  static int64_t size(int64_t m) { return (N * (1 + triangle(m)) + 2 + 15) / 16 * 16; }
  Sums(C* at, int64_t m) : shift(at + N * (1 + triangle(m))), top(shift + 1), squares(at), gram(at + N) {}
  void clear(int64_t m) const {
    *shift = *top = C(-kInf);
    for (int64_t i = 0; i < N * (1 + triangle(m)); ++i) squares[i] = 0;
  }
  void scale(int64_t m, C factor) const {
    for (int64_t i = 0; i < N; ++i) squares[i] *= factor * factor;
    for (int64_t i = 0; i < N * triangle(m); ++i) gram[i] *= factor;
  }
};
template <typename C> using Partial = Sums<C, lanes<C>>;
typedef Sums<double, 1> Total;

inline double add_lanes(const double* p) {
  typedef double quad __attribute__((vector_size(32), aligned(8), may_alias));
  constexpr int64_t kLanes = lanes<double>;
  if constexpr (kLanes == 2) return p[0] + p[1];
  quad q = *reinterpret_cast<const quad*>(p);
  if constexpr (kLanes == 8) q += *reinterpret_cast<const quad*>(p + 4);
  return (q[0] + q[2]) + (q[1] + q[3]);
}
inline double add_lanes(const float* p) {
  typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
  quad q = *reinterpret_cast<const quad*>(p);
  for (int i = 4; i < lanes<float>; i += 4) q += *reinterpret_cast<const quad*>(p + i);
  return double((q[0] + q[2]) + (q[1] + q[3]));
}

template <typename C> void add_up(const Total& total, const Partial<C>& partial, int64_t m) {
  *total.shift = double(*partial.shift);
  *total.top = double(*partial.top);
  *total.squares = add_lanes(partial.squares);
  for (int64_t i = 0; i < triangle(m); ++i) total.gram[i] = add_lanes(partial.gram + i * lanes<C>);
}

template <typename C> inline C largest(vec<C> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) return _mm512_reduce_max_ps((__m512)x);
  else return _mm512_reduce_max_pd((__m512d)x);
#else
  return reduce_max<C>(x);
#endif
}

// exp(from - to) for shifts that may both be -inf (nothing summed yet)
template <typename C> C rescale(C from, C to) { return from == to ? C(1) : exp(from - to); }

inline void merge(const Total& into, const Total& from, int64_t m) {
  if (*from.top > *into.top) *into.top = *from.top;
  double factor = 1.0;
  if (*from.shift > *into.shift) {
    into.scale(m, rescale(*into.shift, *from.shift));
    *into.shift = *from.shift;
  } else {
    factor = rescale(*from.shift, *into.shift);
  }
  *into.squares += *from.squares * factor * factor;
  for (int64_t i = 0; i < triangle(m); ++i) into.gram[i] += from.gram[i] * factor;
}

// Zeroed, on a cache line's boundary: a vector that crosses one costs two reads.
template <typename T> T* allocate_zeros(int64_t count) {
  const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
  void* memory = std::aligned_alloc(64, bytes);
  std::memset(memory, 0, bytes);
  return static_cast<T*>(memory);
}

// A tile: columns of C, the first all ones; rows past the last are zeros, and their weight is 0.
template <typename C> struct Tile {
  int64_t rows = 0, padded = 0, width;  // rows held, rounded up to whole vectors, and room
  C *columns, *log_weights;
  bool weighted;

  // As many rows as fit in the first-level cache: every tile begins with a maximum that all its lanes wait for.
  static int64_t width_for(int64_t m) {
    int64_t width = 1024;
    while (width > 64 && (m + 3) * width * int64_t(sizeof(C)) > 32768) width /= 2;
    return width;
  }
  static int64_t size(int64_t m) { return (m + 2) * width_for(m); }
  Tile(C* memory, int64_t m, bool weighted)
      : width(width_for(m)), columns(memory), log_weights(memory + (m + 1) * width), weighted(weighted) {
    for (int64_t i = 0; i < width; ++i) columns[i] = 1;
  }
  // One that was loaded there before.
  Tile(C* memory, int64_t m, bool weighted, int64_t rows)
      : rows(rows), padded((rows + lanes<C> - 1) / lanes<C> * lanes<C>), width(width_for(m)), columns(memory),
        log_weights(memory + (m + 1) * width), weighted(weighted) {}
  const C* column(int64_t j) const { return columns + j * width; }
};

template <typename S> inline const S* row_of(const MapInput& in, int64_t i) {
  return static_cast<const S*>(in.rewards) + (in.order != nullptr ? in.order[i] : i) * in.row_stride;
}

// ---- four rows and four columns at a time: a strided store for every element would cost more than all the arithmetic ----

template <typename C> struct Quad;
template <> struct Quad<double> {
  typedef double type __attribute__((vector_size(32)));
  typedef double unaligned __attribute__((vector_size(32), aligned(8), may_alias));
  typedef int64_t pick __attribute__((vector_size(32)));
};
template <> struct Quad<float> {
  typedef float type __attribute__((vector_size(16)));
  typedef float unaligned __attribute__((vector_size(16), aligned(4), may_alias));
  typedef int32_t pick __attribute__((vector_size(16)));
};
template <typename C> using quad = typename Quad<C>::type;

inline quad<double> widen4(const double* p) { return *reinterpret_cast<const Quad<double>::unaligned*>(p); }
inline quad<double> widen4(const float* p) {
#if defined(__AVX__)
  return (quad<double>)_mm256_cvtps_pd(_mm_loadu_ps(p));  // GCC 12 makes two halves of __builtin_convertvector
#else
  return quad<double>{p[0], p[1], p[2], p[3]};
#endif
}

// Four values of a row less the center.
template <typename C, typename S> inline quad<C> centered4(const S* p, quad<double> center) {
  if constexpr (sizeof(C) == 8) return widen4(p) - center;
  else return __builtin_convertvector(widen4(p) - center, quad<float>);
}

template <typename C, typename S>
inline void transpose_4x4(C* columns, int64_t width, const S* const rows[4], quad<double> c, int64_t kept) {
  typedef typename Quad<C>::pick pick;
  quad<C> r[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) r[k] = centered4<C, S>(rows[k], c);
  const quad<C> even01 = __builtin_shuffle(r[0], r[1], pick{0, 4, 2, 6}), odd01 = __builtin_shuffle(r[0], r[1], pick{1, 5, 3, 7});
  const quad<C> even23 = __builtin_shuffle(r[2], r[3], pick{0, 4, 2, 6}), odd23 = __builtin_shuffle(r[2], r[3], pick{1, 5, 3, 7});
  const auto put = [&](int64_t j, quad<C> x) {
    if (j < kept) *reinterpret_cast<typename Quad<C>::unaligned*>(columns + j * width) = x;
  };
  put(0, __builtin_shuffle(even01, even23, pick{0, 1, 4, 5}));
  put(1, __builtin_shuffle(odd01, odd23, pick{0, 1, 4, 5}));
  put(2, __builtin_shuffle(even01, even23, pick{2, 3, 6, 7}));
  put(3, __builtin_shuffle(odd01, odd23, pick{2, 3, 6, 7}));
}

#if defined(__AVX512F__)
// Lane l of the p-th vector that `transpose_rows` makes: in which of the packed values it lies.
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
template <int M, typename C>
static int64_t transpose_rows(C* columns, int64_t width, const float* packed, int64_t rows, const double* center) {
  static constexpr Picks<M> picks;
  constexpr int kIn = (M + 1) / 2;
  __m512i at[kIn][kIn];
  __m512 narrow_center[kIn];
  for (int p = 0; p < kIn; ++p) {
    for (int v = 0; v < kIn; ++v) at[p][v] = _mm512_load_si512(picks.at[p][v]);
    float c[16];
    for (int l = 0; l < 16; ++l) c[l] = float(center[packed_place<M>(p, l) % M]);
    narrow_center[p] = _mm512_loadu_ps(c);
  }
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) {
    const float* from = packed + i * M;
    __m512 in[kIn];
#pragma GCC unroll 4
    for (int v = 0; v < kIn; ++v) {
      // Far enough ahead for memory; past the end it does no harm.
      __builtin_prefetch(from + 16 * v + 256 * M);
      in[v] = 2 * v + 1 < M ? _mm512_loadu_ps(from + 16 * v) : _mm512_maskz_loadu_ps(0xff, from + 16 * v);
    }
#pragma GCC unroll 4
    for (int p = 0; p < kIn; ++p) {
      __m512 x;
      if constexpr (kIn == 1) {
        x = M == 2 ? _mm512_permutexvar_ps(_mm512_and_si512(at[0][0], _mm512_set1_epi32(15)), in[0]) : in[0];
      } else {
        x = _mm512_permutex2var_ps(in[0], at[p][1], in[1]);
      }
#pragma GCC unroll 4
      for (int v = 2; v < kIn; ++v) x = _mm512_permutex2var_ps(x, at[p][v], in[v]);
      C* first = columns + 2 * p * width + i;
      if constexpr (sizeof(C) == 4) {
        x = _mm512_sub_ps(x, narrow_center[p]);
        _mm256_storeu_ps(first, _mm512_castps512_ps256(x));
        if (2 * p + 1 < M) _mm256_storeu_ps(first + width, _mm512_extractf32x8_ps(x, 1));
      } else {
        _mm512_storeu_pd(first, _mm512_sub_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_set1_pd(center[2 * p])));
        if (2 * p + 1 < M) {
          _mm512_storeu_pd(first + width, _mm512_sub_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)), _mm512_set1_pd(center[2 * p + 1])));
        }
      }
    }
  }
  return i;
}
#endif

template <typename C, typename S> static void load_tile(Tile<C>& tile, const MapInput& in, int64_t begin, int64_t end) {
  tile.rows = end - begin;
  tile.padded = (tile.rows + lanes<C> - 1) / lanes<C> * lanes<C>;
  const int64_t width = tile.width, m = in.m;
  C* columns = tile.columns + width;
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    if (in.order == nullptr && in.row_stride == m) {
      const float* packed = row_of<float>(in, begin);
      switch (m) {
        case 1: i = transpose_rows<1, C>(columns, width, packed, tile.rows, in.center); break;
        case 2: i = transpose_rows<2, C>(columns, width, packed, tile.rows, in.center); break;
        case 3: i = transpose_rows<3, C>(columns, width, packed, tile.rows, in.center); break;
        case 4: i = transpose_rows<4, C>(columns, width, packed, tile.rows, in.center); break;
        case 5: i = transpose_rows<5, C>(columns, width, packed, tile.rows, in.center); break;
        case 6: i = transpose_rows<6, C>(columns, width, packed, tile.rows, in.center); break;
        case 7: i = transpose_rows<7, C>(columns, width, packed, tile.rows, in.center); break;
        case 8: i = transpose_rows<8, C>(columns, width, packed, tile.rows, in.center); break;
        default: break;
      }
    }
  }
#endif
  // Of fewer than four columns, what is read beyond a row lies in the rows after it: not so for the last ones.
  const bool narrow = m < 4;
  quad<double> narrow_center = {};
  for (int64_t j = 0; narrow && j < m; ++j) narrow_center[j] = in.center[j];
  for (; i + 4 <= tile.rows; i += 4) {
    const S* rows[4];
    for (int k = 0; k < 4; ++k) rows[k] = row_of<S>(in, begin + i + k);
    // Far enough ahead for memory; past the end, or with an order, a prefetch does no harm.
    __builtin_prefetch(rows[0] + 256 * in.row_stride);
    __builtin_prefetch(rows[2] + 256 * in.row_stride);
    if (narrow) {
      const S* last = static_cast<const S*>(in.rewards) + (in.n - 4) * in.row_stride;
      if (in.row_stride < m || rows[0] > last || rows[1] > last || rows[2] > last || rows[3] > last) break;
      transpose_4x4<C, S>(columns + i, width, rows, narrow_center, m);
      continue;
    }
    for (int64_t j = 0;; j = at_most(j + 4, m - 4)) {  // the last block overlaps the one before
      const S* const at[4] = {rows[0] + j, rows[1] + j, rows[2] + j, rows[3] + j};
      transpose_4x4<C, S>(columns + j * width + i, width, at, widen4(in.center + j), 4);
      if (j == m - 4) break;
    }
  }
  for (; i < tile.rows; ++i) {
    const S* row = row_of<S>(in, begin + i);
    for (int64_t j = 0; j < m; ++j) columns[j * width + i] = C(double(row[j]) - in.center[j]);
  }
  for (; i < tile.padded; ++i) {
    for (int64_t j = 0; j < m; ++j) columns[j * width + i] = 0;
  }
  if (tile.weighted) {
    for (i = 0; i < tile.rows; ++i) {
      tile.log_weights[i] = C(in.log_weights[in.order != nullptr ? in.order[begin + i] : begin + i]);
    }
    for (; i < tile.padded; ++i) tile.log_weights[i] = C(-kInf);
  }
}

// ---- sums ----

// gram[a..a+A) x [b..b+B) of the triangle: sum over rows of e x_a x_b
template <typename C, int A, int B>
static void gram_block(C* gram, const Tile<C>& tile, const C* weights, int64_t m, int64_t a, int64_t b) {
  vec<C> sums[A][B] = {};
  const C *left = tile.column(a), *right = tile.column(b);
  const int64_t width = tile.width;
  for (int64_t i = 0; i < tile.padded; i += lanes<C>) {
    const vec<C> e = load<C>(weights + i);
    vec<C> x[B];
#pragma GCC unroll 4
    for (int k = 0; k < B; ++k) x[k] = load<C>(right + k * width + i);
#pragma GCC unroll 4
    for (int j = 0; j < A; ++j) {
      const vec<C> y = e * load<C>(left + j * width + i);
#pragma GCC unroll 4
      for (int k = 0; k < B; ++k) sums[j][k] += y * x[k];
    }
  }
  for (int j = 0; j < A; ++j) {
    const int64_t row = a + j, start = row * (m + 1) - row * (row - 1) / 2 - row;  // of (row, 0), were it stored
    for (int k = 0; k < B; ++k) {
      if (b + k < row) continue;
      C* at = gram + (start + b + k) * lanes<C>;
      store<C>(at, load<C>(at) + sums[j][k]);
    }
  }
}

template <typename C, int A> static void gram_rows(C* gram, const Tile<C>& tile, const C* weights, int64_t m, int64_t a) {
  for (int64_t b = a; b <= m; b += 4) {
    switch (m + 1 - b) {
      case 1: gram_block<C, A, 1>(gram, tile, weights, m, a, b); break;
      case 2: gram_block<C, A, 2>(gram, tile, weights, m, a, b); break;
      case 3: gram_block<C, A, 3>(gram, tile, weights, m, a, b); break;
      default: gram_block<C, A, 4>(gram, tile, weights, m, a, b); break;
    }
  }
}

// Rows 1 .. m of the triangle for a small m, every value read once.
template <typename C, int M> static void gram_whole(C* gram, const Tile<C>& tile, const C* weights) {
  vec<C> sums[M][M] = {};
  const C* values = tile.column(1);
  const int64_t width = tile.width;
  for (int64_t i = 0; i < tile.padded; i += lanes<C>) {
    const vec<C> e = load<C>(weights + i);
    vec<C> x[M];
#pragma GCC unroll 8
    for (int j = 0; j < M; ++j) x[j] = load<C>(values + j * width + i);
#pragma GCC unroll 8
    for (int j = 0; j < M; ++j) {
      const vec<C> y = e * x[j];
#pragma GCC unroll 8
      for (int k = j; k < M; ++k) sums[j][k] += y * x[k];
    }
  }
  C* at = gram + (M + 1) * lanes<C>;
#pragma GCC unroll 8
  for (int j = 0; j < M; ++j) {
#pragma GCC unroll 8
    for (int k = j; k < M; ++k, at += lanes<C>) store<C>(at, load<C>(at) + sums[j][k]);
  }
}

// scores <- lambda . x (+ log w); returns the vectors of the largest and of the largest lambda . x with w > 0.
// M = m where the compiler knows it, so that lambda stays in registers; 0 otherwise.
template <typename C, int M>
static void score_tile(vec<C>& best, vec<C>& top, const Tile<C>& tile, C* scores, const C* lambda, int64_t m) {
  const int64_t width = tile.width;
  const C* x = tile.column(1);
  const C low = C(-kInf);
  vec<C> fixed[M > 0 ? M : 1];
#pragma GCC unroll 8
  for (int j = 0; j < M; ++j) fixed[j] = splat<C>(lambda[j]);
  for (int64_t i = 0; i < tile.padded; i += lanes<C>) {
    vec<C> s = {};
    if constexpr (M > 0) {
#pragma GCC unroll 8
      for (int j = 0; j < M; ++j) s += fixed[j] * load<C>(x + j * width + i);
    } else {
      for (int64_t j = 0; j < m; ++j) s += lambda[j] * load<C>(x + j * width + i);
    }
    if (tile.weighted) {
      const vec<C> w = load<C>(tile.log_weights + i);
      top = max<C>(top, w > low ? s : splat<C>(low));
      s = w > low ? s + w : splat<C>(low);
    }
    store<C>(scores + i, s);
    best = max<C>(best, s);
  }
}

// scores <- e = exp(scores - shift); adds sum e^2, and with M > 0 sum e (1, x): the triangle's first row
template <typename C, int M> static void exp_tile(const Partial<C>& sums, const Tile<C>& tile, C* scores, C shift, bool ones) {
  const C* x = tile.column(1);
  const int64_t width = tile.width;
  vec<C> squares = {}, first[M + 1] = {};
  const auto add = [&](int64_t i, vec<C> e) {
    squares += e * e;
    if constexpr (M > 0) {
      first[0] += e;
#pragma GCC unroll 8
      for (int j = 0; j < M; ++j) first[j + 1] += e * load<C>(x + j * width + i);
    }
    store<C>(scores + i, e);
  };
  if (ones) {
    for (int64_t i = 0; i < tile.padded; i += lanes<C>) add(i, load<C>(scores + i));
  } else {
    for (int64_t i = 0; i < tile.padded; i += lanes<C>) add(i, exp_nonpositive(load<C>(scores + i) - shift));
  }
  store<C>(sums.squares, load<C>(sums.squares) + squares);
  if constexpr (M > 0) {
#pragma GCC unroll 9
    for (int j = 0; j <= M; ++j) store<C>(sums.gram + j * lanes<C>, load<C>(sums.gram + j * lanes<C>) + first[j]);
  }
}

// Adds a tile's sums; without `second` of the triangle its first row alone. scores: room for the tile's width.
template <typename C, int M>
static void add_tile_of(const Partial<C>& sums, const Tile<C>& tile, C* scores, const C* lambda, int64_t m, bool second) {
  const C low = C(-kInf);
  bool zero = !tile.weighted;
  for (int64_t j = 0; j < m; ++j) zero = zero && lambda[j] == 0;
  if (zero) {  // every e is 1
    *sums.shift = *sums.top = 0;
    for (int64_t i = 0; i < tile.rows; ++i) scores[i] = 1;
    for (int64_t i = tile.rows; i < tile.padded; ++i) scores[i] = 0;
  } else {
    vec<C> best = splat<C>(low), top = best;
    score_tile<C, M>(best, top, tile, scores, lambda, m);
    for (int64_t i = tile.rows; i < tile.padded; ++i) scores[i] = low;
    C tile_best = low, tile_top = low;
    if (tile.rows == tile.padded) {
      tile_best = largest<C>(best);
      if (tile.weighted) tile_top = largest<C>(top);
    } else {  // the padding's scores are in `best`
      for (int64_t i = 0; i < tile.rows; ++i) tile_best = scores[i] > tile_best ? scores[i] : tile_best;
      if (tile.weighted) {
        for (int64_t i = 0; i < tile.rows; ++i) {
          const C s = scores[i] - tile.log_weights[i];
          if (tile.log_weights[i] > low && s > tile_top) tile_top = s;
        }
      }
    }
    if (!tile.weighted) tile_top = tile_best;
    if (tile_top > *sums.top) *sums.top = tile_top;
    if (tile_best > *sums.shift) {
      sums.scale(m, rescale(*sums.shift, tile_best));
      *sums.shift = tile_best;
    }
  }
  exp_tile<C, M>(sums, tile, scores, *sums.shift == low ? C(0) : *sums.shift, zero);
  if constexpr (M > 0 && M <= kInRegisters) {
    if (second) gram_whole<C, M>(sums.gram, tile, scores);
    return;
  }
  if (M == 0 && !second) {
    gram_rows<C, 1>(sums.gram, tile, scores, m, 0);
    return;
  }
  for (int64_t a = M > 0 ? 1 : 0; a <= m && second;) {
    const int64_t left = m + 1 - a;
    if (left == 1) {
      gram_rows<C, 1>(sums.gram, tile, scores, m, a);
      a += 1;
    } else if (left == 2 || left == 4) {  // 2 + 2: one row alone would wait for each of its additions
      gram_rows<C, 2>(sums.gram, tile, scores, m, a);
      a += 2;
    } else {
      gram_rows<C, 3>(sums.gram, tile, scores, m, a);
      a += 3;
    }
  }
}

template <typename C>
static void add_tile(const Partial<C>& sums, const Tile<C>& tile, C* scores, const C* lambda, int64_t m, bool second) {
  switch (m) {
    case 1: return add_tile_of<C, 1>(sums, tile, scores, lambda, m, second);
    case 2: return add_tile_of<C, 2>(sums, tile, scores, lambda, m, second);
    case 3: return add_tile_of<C, 3>(sums, tile, scores, lambda, m, second);
    case 4: return add_tile_of<C, 4>(sums, tile, scores, lambda, m, second);
    case 5: return add_tile_of<C, 5>(sums, tile, scores, lambda, m, second);
    case 6: return add_tile_of<C, 6>(sums, tile, scores, lambda, m, second);
    case 7: return add_tile_of<C, 7>(sums, tile, scores, lambda, m, second);
    case 8: return add_tile_of<C, 8>(sums, tile, scores, lambda, m, second);
    default: return add_tile_of<C, 0>(sums, tile, scores, lambda, m, second);
  }
}

}  // namespace fastalign::FASTALIGN_LEVEL
