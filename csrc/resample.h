// Candidates drawn from each row of log-weights.
#pragma once

#include "isa.h"
#include "rows.h"

namespace fastalign {

// In the order of METHODS in fastalign/ops/resample.py.
enum class ResampleMethod { multinomial, systematic, stratified, residual, gumbel_top_k, best };

struct ResampleOptions {
  int64_t k;
  ResampleMethod method;
  const bool* mask;  // (rows, vocab) contiguous, true = valid; null: all
  uint64_t seed;
};

}  // namespace fastalign

FASTALIGN_DECLARE(
  // ids (rows, k). log_weights float32 or float64. False if memory ran out.
  bool resample(int64_t* ids, const Rows& log_weights, const ResampleOptions& options, int threads);
)
