// token_logratios: policy and reference row by row, so that one thread scores both rows of a label.
#include "token_logratios.h"

#include "softmax.h"

namespace fastalign::FASTALIGN_LEVEL {

template <typename S>
static void forward(const LogratioOutputs& out, const Rows& policy, const Rows& ref, const int64_t* labels,
                    int64_t ignore_index, const Transform& t, int threads) {
  using C = typename Storage<S>::C;
  const RowTransform<C> transform(t);
  C* log_ratios = static_cast<C*>(out.log_ratios);
  C *policy_max = static_cast<C*>(out.policy_max), *policy_sum = static_cast<C*>(out.policy_sum);
  C *ref_max = static_cast<C*>(out.ref_max), *ref_sum = static_cast<C*>(out.ref_sum);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < policy.count; ++r) {
    SoftmaxStats<C> p, q;
    log_ratios[r] = p.max = q.max = 0;
    if (labels[r] != ignore_index) {
      p = softmax_stats<false>(policy.row<S>(r), policy.vocab, labels[r], transform);
      q = softmax_stats<false>(ref.row<S>(r), ref.vocab, labels[r], transform);
      log_ratios[r] = label_logprob(p) - label_logprob(q);
    }
    policy_max[r] = p.max;
    policy_sum[r] = p.sum;
    ref_max[r] = q.max;
    ref_sum[r] = q.sum;
  }
}

void token_logratios_forward(const LogratioOutputs& out, const Rows& policy, const Rows& ref, const int64_t* labels,
                             int64_t ignore_index, const Transform& t, int threads) {
  FASTALIGN_SWITCH(policy.dtype, S, forward<S>(out, policy, ref, labels, ignore_index, t, threads))
}

}  // namespace fastalign::FASTALIGN_LEVEL
