// The MAP dual minimised for K palettes, whole solves without a word to Python: fastalign/palette/_newton.py's method.
#pragma once

#include "map_statistics.h"

namespace fastalign {

// K points of the dual, as fastalign/palette/_batch.py's Points has them. In: the points at mu = 0; out: the last ones.
struct MapPoints {
  double *mu, *value, *gradient, *hessian, *top, *ess;  // (K, m), (K,), (K, m), (K, m, m), (K,), (K,)
};

constexpr int64_t kMostValues = 64;
// What rounding may take from a covariance, as a share of the second moment.
constexpr double kRounding = 16 * 0x1p-52;

struct MapProblem {
  MapInput rewards;  // one group of all rows, m <= kMostValues
  int64_t count;
  double log_norm, tol;         // log sum of the weights; bound on the residual
  const double *scale, *offset;  // (m,), (K, m): mu = lambda scale; center - palette
  const double *lower, *upper;   // (m,) of mu
  const double* start;           // (K, m) mu to begin at, or null
  const bool *constant, *skip;   // (m,) rewards that do not vary; (K,) palettes to leave alone
};

}  // namespace fastalign

FASTALIGN_DECLARE(
  // passes (K,): how often all rows were read; certificate (K, m) and certified (K,): a direction mu / |mu| in which
  // every row falls short. keep: whether the columns are held in memory, else there is one palette.
  // The same bits at any number of threads.
  void map_newton(const MapPoints& points, int64_t* passes, double* certificate, bool* certified, const MapProblem& problem,
                  bool keep, int threads);
)
