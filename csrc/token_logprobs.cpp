// token_logprobs: one read of each row forward, one read and one write backward. Built once per level.
#include "token_logprobs.h"

#include "softmax.h"

namespace fastalign::FASTALIGN_LEVEL {

template <bool kAll, typename S>
static void forward(const LogprobOutputs& out, const Rows& logits, const int64_t* labels, int64_t ignore_index,
                    const Transform& t, int threads) {
  using C = typename Storage<S>::C;
  const RowTransform<C> transform(t);
  C *log_probs = static_cast<C*>(out.log_probs), *max = static_cast<C*>(out.max), *sum = static_cast<C*>(out.sum);
  C *entropy = static_cast<C*>(out.entropy), *mean = static_cast<C*>(out.mean_logits);
  C* log_squares = static_cast<C*>(out.log_sum_sq_probs);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < logits.count; ++r) {
    if (labels[r] == ignore_index) {
      log_probs[r] = max[r] = sum[r] = 0;
      if constexpr (kAll) {
        entropy[r] = mean[r] = log_squares[r] = 0;
        out.is_top1[r] = false;
      }
      continue;
    }
    const SoftmaxStats<C> stats = softmax_stats<kAll>(logits.row<S>(r), logits.vocab, labels[r], transform);
    log_probs[r] = label_logprob(stats);
    max[r] = stats.max;
    sum[r] = stats.sum;
    if constexpr (kAll) {
      const bool empty = stats.sum == 0 && is_neg_inf(stats.max);
      const C log_sum = C(__builtin_log(double(stats.sum)));
      entropy[r] = empty ? C(0) : log_sum - stats.weighted / stats.sum;
      mean[r] = stats.total / C(logits.vocab);
      log_squares[r] = empty ? C(0) : C(__builtin_log(double(stats.squares))) - 2 * log_sum;
      const bool defined = stats.sum == stats.sum;
      out.is_top1[r] = !empty && defined && stats.label_logit >= stats.max && stats.label_logit > stats.max_before_label;
    }
  }
}

void token_logprobs_forward(const LogprobOutputs& out, const Rows& logits, const int64_t* labels,
                            int64_t ignore_index, const Transform& t, int threads) {
  FASTALIGN_SWITCH(logits.dtype, S,
    out.entropy != nullptr ? forward<true, S>(out, logits, labels, ignore_index, t, threads)
                           : forward<false, S>(out, logits, labels, ignore_index, t, threads))
}

template <typename S>
static void backward(S* grad_logits, const LogprobGradients& grads, const Rows& logits, const int64_t* labels,
                     int64_t ignore_index, const Transform& t, int threads) {
  using C = typename Storage<S>::C;
  const RowTransform<C> transform(t);
  const C *g = static_cast<const C*>(grads.grad_log_probs), *g_entropy = static_cast<const C*>(grads.grad_entropy);
  const C *max = static_cast<const C*>(grads.max), *sum = static_cast<const C*>(grads.sum);
  const C* entropy = static_cast<const C*>(grads.entropy);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < logits.count; ++r) {
    S* grad = grad_logits + r * logits.vocab;
    const S* row = logits.row<S>(r);
    const C gh = g_entropy != nullptr ? g_entropy[r] : C(0);
    if (labels[r] == ignore_index || (g[r] == 0 && gh == 0)) {
      __builtin_memset(static_cast<void*>(grad), 0, size_t(logits.vocab) * sizeof(S));
    } else {
      const SoftmaxGradient<C> of = {g[r], gh, max[r], sum[r], gh != 0 ? entropy[r] : C(0)};
      softmax_gradient(grad, row, logits.vocab, labels[r], of, transform);
    }
  }
}

void token_logprobs_backward(void* grad_logits, const LogprobGradients& grads, const Rows& logits,
                             const int64_t* labels, int64_t ignore_index, const Transform& t, int threads) {
  FASTALIGN_SWITCH(logits.dtype, S,
    backward<S>(static_cast<S*>(grad_logits), grads, logits, labels, ignore_index, t, threads))
}

}  // namespace fastalign::FASTALIGN_LEVEL
