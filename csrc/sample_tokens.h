// One token drawn from each row of logits, and its log-probability under the distribution it was drawn from.
#pragma once

#include "isa.h"
#include "rows.h"

namespace fastalign {

struct SampleOptions {
  double temperature;  // 0: the largest logit
  int64_t top_k;       // 0: off
  double top_p;        // 1: off
  double min_p;        // 0: off
  uint64_t seed, offset;
  const int64_t* rows;  // the stream of each row; null: 0, 1, 2, ..
  int64_t rows_width;   // 2: each row's stream, and a step that is added to offset
};

}  // namespace fastalign

FASTALIGN_DECLARE(
  // ids (rows,), log_probs (rows,) in the compute type. False if memory ran out.
  bool sample_tokens(int64_t* ids, void* log_probs, const Rows& logits, const SampleOptions& options, int threads);
)
