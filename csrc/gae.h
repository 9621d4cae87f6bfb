// Generalised advantage estimation: a scan from each row's end.
#pragma once

#include "isa.h"
#include "rows.h"

namespace fastalign {

struct GaeInput {
  Rows rewards, values;  // both float32 or both float64
  const bool* mask;      // (rows, length) contiguous, true = valid
  double gamma, lambda;
};

}  // namespace fastalign

FASTALIGN_DECLARE(
  // advantages, returns (rows, length) contiguous, in the dtype of rewards
  void gae(void* advantages, void* returns, const GaeInput& in, int threads);
)
