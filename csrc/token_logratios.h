// log p(label) - log p0(label) from two sets of logits, each read once, without intermediate log-probabilities.
#pragma once

#include "isa.h"
#include "rows.h"

namespace fastalign {

// Arrays of (rows,) in the compute type; max and sum of each side are what token_logprobs_backward needs.
struct LogratioOutputs {
  void *log_ratios, *policy_max, *policy_sum, *ref_max, *ref_sum;
};

}  // namespace fastalign

FASTALIGN_DECLARE(
  // policy and ref have the same dtype and vocab
  void token_logratios_forward(const LogratioOutputs& out, const Rows& policy, const Rows& ref, const int64_t* labels,
                               int64_t ignore_index, const Transform& transform, int threads);
)
