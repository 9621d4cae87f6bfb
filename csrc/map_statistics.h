// Moments of the rewards under the tilted distribution p ∝ w exp(lambda . (r - center)), for K lambdas, in one read.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace fastalign {

struct MapInput {
  const void* rewards;  // (n, m), float32 or float64; rows contiguous, row_stride elements apart
  DType dtype;
  int64_t n, m, row_stride;
  const double* center;       // (m,)
  const double* log_weights;  // (n,) or null: all 0
  // Groups in CSR form: group g holds the rows order[offsets[g] .. offsets[g + 1]), or those numbers themselves
  // where order is null. offsets null: one group of all rows, and then order is null too.
  const int64_t *order, *offsets;
  int64_t groups;
};

}  // namespace fastalign

FASTALIGN_DECLARE(
  // out (K, 3 + m + m * m): log sum w e^s, (sum w e^s)^2 / sum (w e^s)^2, the largest s of a row with w > 0, the mean
  // of r - center (m), its covariance (m, m); with groups the mean of each over the groups. lambda (K, m).
  // The result does not depend on the number of threads.
  void map_statistics(double* out, const MapInput& in, const double* lambda, int64_t count, int threads);
)
