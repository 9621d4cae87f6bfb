// The tilted laws near one of them as a power series: moments of all rows under that law give Z, its gradient and its
// Hessian at a lambda nearby without another look at the rows. For rewards of unit variance whose moments are a normal
// law's, a series of degree p is off by |delta|^(p+1) / (p+1)!!. Included by the per-level files alone (see isa.h).
#pragma once

#include "map_nearby.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr int kMostSeries = 4;         // values
constexpr int64_t kSeriesRows = 256;   // whose powers stay in the first-level cache

constexpr int64_t whole_vectors(int64_t count) { return (count + lanes<double> - 1) / lanes<double> * lanes<double>; }

// Coefficients of x_1^a .. x_R^z, a + .. + z <= degree; each run of the last one's powers fills whole vectors.
template <int R> constexpr int64_t series_size(int degree) {
  if constexpr (R == 1) return whole_vectors(degree + 1);
  else {
    int64_t size = 0;
    for (int a = 0; a <= degree; ++a) size += series_size<R - 1>(degree - a);
    return size;
  }
}

// at += sum over the rows of product x_1^a .. x_R^z; returns where the next begin. powers: (R, stride / kSeriesRows,
// kSeriesRows), from the power 0 on; room for R - 1 more products.
template <int R>
static double* add_moments(double* at, int degree, const double* powers, int64_t stride, const double* product, double* room) {
  if constexpr (R == 1) {
    for (int c = 0; c <= degree; c += 8) {
      with_width<8>(at_most(8, degree + 1 - c), [&](auto count) {
        constexpr int kCount = decltype(count)::value;
        const double* power = powers + c * kSeriesRows;
        vec<double> sums[kCount] = {};
        for (int64_t i = 0; i < kSeriesRows; i += lanes<double>) {
          const vec<double> x = load<double>(product + i);
#pragma GCC unroll 8
          for (int k = 0; k < kCount; ++k) sums[k] += x * load<double>(power + k * kSeriesRows + i);
        }
        for (int k = 0; k < kCount; ++k) {
          alignas(64) double lane[lanes<double>];
          store<double>(lane, sums[k]);
          at[c + k] += add_lanes(lane);
        }
      });
    }
    return at + whole_vectors(degree + 1);
  } else {
    for (int a = 0; a <= degree; ++a) {
      for (int64_t i = 0; i < kSeriesRows; i += lanes<double>) {
        store<double>(room + i, load<double>(product + i) * load<double>(powers + a * kSeriesRows + i));
      }
      at = add_moments<R - 1>(at, degree - a, powers + stride, stride, room, room + kSeriesRows);
    }
    return at;
  }
}

// A sum, its gradient and the upper triangle of its Hessian, in lanes to be added up.
template <int R> struct Jet {
  vec<double> value = {}, first[R] = {}, second[R * (R + 1) / 2] = {};
};

// The series of R variables whose coefficients begin at `at`, which is moved behind them. factors: (R, 3, room) x^a, its
// first and its second derivative.
template <int R> inline Jet<R> sum_of_series(const double*& at, int degree, const double* factors, int64_t room) {
  Jet<R> jet;
  if constexpr (R == 1) {
    for (int c = 0; c <= degree; c += lanes<double>) {
      const vec<double> x = load<double>(at + c);
      jet.value += x * load<double>(factors + c);
      jet.first[0] += x * load<double>(factors + room + c);
      jet.second[0] += x * load<double>(factors + 2 * room + c);
    }
    at += whole_vectors(degree + 1);
  } else {
    for (int a = 0; a <= degree; ++a) {
      const Jet<R - 1> inner = sum_of_series<R - 1>(at, degree - a, factors + 3 * room, room);
      const double x = factors[a], dx = factors[room + a], ddx = factors[2 * room + a];
      jet.value += x * inner.value;
      jet.first[0] += dx * inner.value;
      jet.second[0] += ddx * inner.value;
#pragma GCC unroll 8
      for (int j = 1; j < R; ++j) {
        jet.first[j] += x * inner.first[j - 1];
        jet.second[j] += dx * inner.first[j - 1];
      }
#pragma GCC unroll 8
      for (int j = R; j < R * (R + 1) / 2; ++j) jet.second[j] += x * inner.second[j - R];
    }
  }
  return jet;
}

// The terms of the highest degree alone.
template <int R> inline double last_of_series(const double*& at, int degree, const double* factors, int64_t room) {
  double sum = 0;
  if constexpr (R == 1) {
    sum = at[degree] * factors[degree];
    at += whole_vectors(degree + 1);
  } else {
    for (int a = 0; a <= degree; ++a) sum += factors[a] * last_of_series<R - 1>(at, degree - a, factors + 3 * room, room);
  }
  return sum;
}

// sum e^(lambda . x) of the rows and its derivatives, about the law of mu = center; mu = lambda scale.
struct Series {
  int64_t m = 0;
  int degree = 0;
  double *center = nullptr, *mean = nullptr, *coefficients = nullptr;  // (m,), (m,) of x / scale under that law
  double top = 0;                                                      // the largest score at the center
  int64_t stride() const { return (degree + 1) * kSeriesRows; }
  int64_t room() const { return whole_vectors(degree + 1); }
  static int64_t size(int64_t m, int degree) {
    int64_t size = 0;
    with_width<kMostSeries>(m, [&](auto width) { size = series_size<width>(degree); });
    return size;
  }
  static int64_t memory_for_rows(int64_t m, int degree) { return m * (degree + 1) * kSeriesRows + m * kSeriesRows; }

  // moments (size,) += those of at most kSeriesRows rows, of which columns, `width` apart, holds x and weights the e.
  // A coefficient is a moment over the factorials of its powers. memory: memory_for_rows.
  void add(double* moments, const double* columns, int64_t width, int64_t rows, const double* weights, const double* scale,
           double* memory) const {
    for (int64_t j = 0; j < m; ++j) {
      const double* x = columns + j * width;
      double* power = memory + j * stride();
      const double each = 1 / scale[j];
      for (int64_t i = 0; i < kSeriesRows; i += lanes<double>) {
        const vec<double> z = i < rows ? load<double>(x + i) * each - mean[j] : splat<double>(0);
        vec<double> product = splat<double>(1);
        for (int a = 0; a <= degree; ++a) {
          if (a > 0) product *= z * (1.0 / a);
          store<double>(power + a * kSeriesRows + i, product);
        }
      }
    }
    with_width<kMostSeries>(m, [&](auto width) {
      add_moments<width>(moments, degree, memory, stride(), weights, memory + m * stride());
    });
  }

  // total <- the sums at mu; those of e^2 are not known. factors: (m, 3, room())
  void sum(const Total& total, const double* mu, const double* scale, double* factors) const {
    double along = 0;
    for (int64_t j = 0; j < m; ++j) {
      const double delta = mu[j] - center[j];
      along += delta * mean[j];
      double *x = factors + 3 * j * room(), *dx = x + room(), *ddx = dx + room();
      x[0] = 1, dx[0] = ddx[0] = 0;
      for (int a = 1; a <= degree; ++a) {
        x[a] = x[a - 1] * delta;
        dx[a] = a * x[a - 1];
        ddx[a] = a * dx[a - 1];
      }
    }
    with_width<kMostSeries>(m, [&](auto width) {
      const double* at = coefficients;
      const Jet<width> jet = sum_of_series<width>(at, degree, factors, room());
      const auto all = [](vec<double> x) {
        alignas(64) double lane[lanes<double>];
        store<double>(lane, x);
        return add_lanes(lane);
      };
      const double value = all(jet.value);
      double first[width], *gram = total.gram;
      *gram++ = value;
      for (int j = 0; j < width; ++j) {
        first[j] = all(jet.first[j]);
        *gram++ = scale[j] * (first[j] + mean[j] * value);
      }
      const vec<double>* second = jet.second;
      for (int j = 0; j < width; ++j) {
        for (int k = j; k < width; ++k) {
          *gram++ = scale[j] * scale[k] * (all(*second++) + mean[j] * first[k] + mean[k] * first[j] + mean[j] * mean[k] * value);
        }
      }
    });
    *total.shift = top + along;
    *total.top = kInf;
    *total.squares = 1;
  }

  // What share of Z the terms of the highest degree made up when `sum` left these factors: about what those that were
  // left out would add.
  double last_share(const double* factors, double z) const {
    double last = 0;
    with_width<kMostSeries>(m, [&](auto width) {
      const double* at = coefficients;
      last = last_of_series<width>(at, degree, factors, room());
    });
    return __builtin_fabs(last / z);
  }
};

}  // namespace fastalign::FASTALIGN_LEVEL
