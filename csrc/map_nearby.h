// Passes over columns that are kept, at a lambda near one whose weights are known: they need no exp, or no search for
// the largest score. Included by the per-level files alone (see isa.h).
#pragma once

#include <type_traits>

#include "map_tile.h"

namespace fastalign::FASTALIGN_LEVEL {

// e^(delta . x) is taken from its series where |delta . x| is at most this.
constexpr float kNearby = 0x1p-8f;
constexpr int kMostNearby = 8;  // values

#if defined(__AVX512F__)
// The bits of 2^(j/16), less what j adds to the exponent where it is shifted there.
alignas(64) constexpr int64_t kRoots[16] = {
  0x3ff0000000000000, 0x3fefb5586cf9890f, 0x3fef72b83c7d517b, 0x3fef387a6e756238,
  0x3fef06fe0a31b715, 0x3feedea64c123422, 0x3feebfdad5362a27, 0x3feeab07dd485429,
  0x3feea09e667f3bcd, 0x3feea11473eb0187, 0x3feeace5422aa0db, 0x3feec49182a3f090,
  0x3feee89f995ad3ad, 0x3fef199bdd85529c, 0x3fef5818dcfba487, 0x3fefa4afa2a490da,
};
#endif

// at += factor x, lane by lane in double
inline void add_widened(double* at, vec<float> x, double factor) {
  constexpr int kHalf = lanes<float> / 2;
  typedef float half __attribute__((vector_size(kHalf * sizeof(float)), aligned(4), may_alias));
  static_assert(kHalf == lanes<double>);
  alignas(64) float both[lanes<float>];
  store<float>(both, x);
  const vec<double> low = __builtin_convertvector(*reinterpret_cast<const half*>(both), vec<double>);
  const vec<double> high = __builtin_convertvector(*reinterpret_cast<const half*>(both + kHalf), vec<double>);
  store<double>(at, load<double>(at) + factor * (low + high));
}

inline void store_narrow(float* to, vec<double> x) {
  typedef float half __attribute__((vector_size(lanes<double> * sizeof(float)), aligned(4), may_alias));
  *reinterpret_cast<half*>(to) = __builtin_convertvector(x, half);
}

// e^(x ln 2 / 16) for -16352 < x <= 0, to 5e-15: with a table of sixteen roots of two, five terms do for twelve.
constexpr double kSixteenths = 23.083120654223414518;  // 16 / ln 2
inline vec<double> exp_of_sixteenths(vec<double> x) {
#if defined(__AVX512F__)
  constexpr double kShift = 0x1.8p52;  // leaves the nearest integer in the low bits
  const vec<double> shifted = x + kShift, r = x - (shifted - kShift);
  vec<double> q = splat<double>(1.2715658864274987159e-9);
  q = q * r + 1.4676444610441940988e-7;
  q = q * r + 1.355080779081733485e-5;
  q = q * r + 9.3838479248623471448e-4;
  q = q * r + 4.3321698784995777266e-2;
  q = q * r + 1.0000000000000044822;
  const __m512i n = (__m512i)shifted;
  const __m512i root = _mm512_permutex2var_epi64(_mm512_load_si512(kRoots), n, _mm512_load_si512(kRoots + 8));
  return q * (vec<double>)_mm512_add_epi64(root, _mm512_slli_epi64(n, 48));
#else
  return exp_nonpositive(x * (1 / kSixteenths));
#endif
}

// Adds sum e (1, x) and sum e^2 of a tile without log weights, e = exp(lambda . x - *sums.shift); no score is above the
// shift, and none 700 below it. weights <- e, and 0 past the last row.
template <int M> static void add_tile_below(const Partial<double>& sums, const Tile<double>& tile, float* weights, const double* lambda) {
  const double shift = *sums.shift, *x = tile.column(1);
  const int64_t width = tile.width;
  vec<double> squares = {}, first[M + 1] = {}, fixed[M], top = splat<double>(-kInf);
#pragma GCC unroll 8
  for (int j = 0; j < M; ++j) fixed[j] = splat<double>(lambda[j] * kSixteenths);
  for (int64_t i = 0; i < tile.padded; i += lanes<double>) {
    vec<double> s = splat<double>(-shift * kSixteenths), values[M];
#pragma GCC unroll 8
    for (int j = 0; j < M; ++j) {
      values[j] = load<double>(x + j * width + i);
      s += fixed[j] * values[j];
    }
    vec<double> e = exp_of_sixteenths(s);
    if (i + lanes<double> > tile.rows) {
      for (int l = 0; l < lanes<double>; ++l) {
        if (i + l >= tile.rows) e[l] = 0, s[l] = -kInf;
      }
    }
    top = max<double>(top, s);
    squares += e * e;
    first[0] += e;
#pragma GCC unroll 8
    for (int j = 0; j < M; ++j) first[j + 1] += e * values[j];
    store_narrow(weights + i, e);
  }
  const double highest = shift + largest<double>(top) * (1 / kSixteenths);
  if (highest > *sums.top) *sums.top = highest;
  store<double>(sums.squares, load<double>(sums.squares) + squares);
#pragma GCC unroll 9
  for (int j = 0; j <= M; ++j) store<double>(sums.gram + j * lanes<double>, load<double>(sums.gram + j * lanes<double>) + first[j]);
}

// By how much sum e (1, x) and sum e^2 change, times `factor`, where lambda moves by delta from the one whose e lie in
// weights; with `second` the rest of the triangle is added as it is after that. In float: what changes is |delta . x|
// of the whole, and its last digits are past the whole's.
template <int M>
static void add_nearby(const Partial<double>& sums, const float* x, int64_t width, int64_t rows, const float* weights,
                       const float* delta, double factor, bool second) {
  vec<float> squares = {}, first[M + 1] = {}, gram[M][M] = {}, fixed[M];
#pragma GCC unroll 8
  for (int j = 0; j < M; ++j) fixed[j] = splat<float>(delta[j]);
  const auto add = [&](int64_t i, auto with_second) {
    vec<float> d = {}, values[M];
#pragma GCC unroll 8
    for (int j = 0; j < M; ++j) {
      values[j] = load<float>(x + j * width + i);
      d += fixed[j] * values[j];
    }
    const vec<float> before = load<float>(weights + i);
    const vec<float> change = before * (d * ((d * (1.0f / 6) + 0.5f) * d + 1.0f));
    squares += change * (before + before + change);
    first[0] += change;
#pragma GCC unroll 8
    for (int j = 0; j < M; ++j) first[j + 1] += change * values[j];
    if constexpr (with_second) {
      const vec<float> after = before + change;
#pragma GCC unroll 8
      for (int j = 0; j < M; ++j) {
        const vec<float> y = after * values[j];
#pragma GCC unroll 8
        for (int k = j; k < M; ++k) gram[j][k] += y * values[k];
      }
    }
  };
  if (second) {
    for (int64_t i = 0; i < rows; i += lanes<float>) add(i, std::true_type());
  } else {
    for (int64_t i = 0; i < rows; i += lanes<float>) add(i, std::false_type());
  }
  add_widened(sums.squares, squares, factor * factor);
#pragma GCC unroll 9
  for (int j = 0; j <= M; ++j) add_widened(sums.gram + j * lanes<double>, first[j], factor);
  if (!second) return;
  double* at = sums.gram + (M + 1) * lanes<double>;
#pragma GCC unroll 8
  for (int j = 0; j < M; ++j) {
#pragma GCC unroll 8
    for (int k = j; k < M; ++k, at += lanes<double>) add_widened(at, gram[j][k], factor);
  }
}

// f(std::integral_constant<int, m>()) for 1 <= m <= Most
template <int Most, typename F> static void with_width(int64_t m, const F& f) {
  if constexpr (Most > 1) {
    if (m < Most) return with_width<Most - 1>(m, f);
  }
  f(std::integral_constant<int, Most>());
}

}  // namespace fastalign::FASTALIGN_LEVEL
