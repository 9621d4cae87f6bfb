// Log-probability of a label under a row of logits, with statistics of the whole softmax, and the gradient.
#pragma once

#include "isa.h"
#include "rows.h"

namespace fastalign {

// Arrays of (rows,) in the compute type: double for float64 logits, float for the others.
// The last four are null if not requested.
struct LogprobOutputs {
  void *log_probs, *max, *sum;  // max and sum of exp(z - max), needed by the gradient
  void *entropy, *mean_logits, *log_sum_sq_probs;
  bool* is_top1;
};

struct LogprobGradients {
  const void *grad_log_probs, *grad_entropy;  // (rows,); grad_entropy may be null, then entropy too
  const void *max, *sum, *entropy;            // as the forward pass wrote them
};

}  // namespace fastalign

FASTALIGN_DECLARE(
  void token_logprobs_forward(const LogprobOutputs& out, const Rows& logits, const int64_t* labels,
                              int64_t ignore_index, const Transform& transform, int threads);
  // grad_logits (rows, vocab) contiguous, in the dtype of logits
  void token_logprobs_backward(void* grad_logits, const LogprobGradients& grads, const Rows& logits,
                               const int64_t* labels, int64_t ignore_index, const Transform& transform, int threads);
)
