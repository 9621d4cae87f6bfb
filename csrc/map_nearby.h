// Passes over columns that are kept, at a lambda near one whose weights are known: they need no exp, or no search for
// the largest score. Included by the per-level files alone (see isa.h).
#pragma once

#include <type_traits>

#include "map_tile.h"

namespace fastalign::FASTALIGN_LEVEL {

// e^(delta . x) is taken from its series where |delta . x| is at most this.
constexpr float kNearby = 0x1p-8f;
constexpr int kMostNearby = 8, kMostThird = 4;  // values

constexpr int64_t third_size(int64_t m) { return m * (m + 1) * (m + 2) / 6; }

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

// Adds sum e (1, x) and sum e^2 of a tile without log weights, e = exp(lambda . x - *sums.shift); no score is above the
// shift. weights <- e, and 0 past the last row.
template <int M> static void add_tile_below(const Partial<double>& sums, const Tile<double>& tile, float* weights, const double* lambda) {
  const double shift = *sums.shift, *x = tile.column(1);
  const int64_t width = tile.width;
  vec<double> squares = {}, first[M + 1] = {}, fixed[M], top = splat<double>(-kInf);
#pragma GCC unroll 8
  for (int j = 0; j < M; ++j) fixed[j] = splat<double>(lambda[j]);
  for (int64_t i = 0; i < tile.padded; i += lanes<double>) {
    vec<double> s = splat<double>(-shift), values[M];
#pragma GCC unroll 8
    for (int j = 0; j < M; ++j) {
      values[j] = load<double>(x + j * width + i);
      s += fixed[j] * values[j];
    }
    if (i + lanes<double> > tile.rows) {
      for (int l = 0; l < lanes<double>; ++l) s[l] = i + l < tile.rows ? s[l] : -kInf;
    }
    top = max<double>(top, s);
    const vec<double> e = exp_nonpositive(s);
    squares += e * e;
    first[0] += e;
#pragma GCC unroll 8
    for (int j = 0; j < M; ++j) first[j + 1] += e * values[j];
    store_narrow(weights + i, e);
  }
  const double highest = shift + largest<double>(top);
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

// third (i <= j <= k, in order) += factor sum e (x - mean)_i (x - mean)_j (x - mean)_k
template <int M>
static void add_third(double* third, const float* x, int64_t width, int64_t rows, const float* weights, const double* mean, double factor) {
  vec<float> sums[M * (M + 1) * (M + 2) / 6] = {}, center[M];
#pragma GCC unroll 4
  for (int j = 0; j < M; ++j) center[j] = splat<float>(float(mean[j]));
  for (int64_t i = 0; i < rows; i += lanes<float>) {
    const vec<float> e = load<float>(weights + i);
    vec<float> values[M];
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) values[j] = load<float>(x + j * width + i) - center[j];
    int at = 0;
#pragma GCC unroll 4
    for (int a = 0; a < M; ++a) {
      const vec<float> once = e * values[a];
#pragma GCC unroll 4
      for (int b = a; b < M; ++b) {
        const vec<float> twice = once * values[b];
#pragma GCC unroll 4
        for (int c = b; c < M; ++c) sums[at++] += twice * values[c];
      }
    }
  }
  for (int i = 0; i < M * (M + 1) * (M + 2) / 6; ++i) {
    double sum = 0;
    for (int l = 0; l < lanes<float>; ++l) sum += double(sums[i][l]);
    third[i] += factor * sum;
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
