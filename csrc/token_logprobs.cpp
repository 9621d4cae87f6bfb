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
      out.is_top1[r] = !empty && stats.label_logit >= stats.max && stats.label_logit > stats.max_before_label;
    }
  }
}

void token_logprobs_forward(const LogprobOutputs& out, const Rows& logits, const int64_t* labels,
                            int64_t ignore_index, const Transform& t, int threads) {
  FASTALIGN_SWITCH(logits.dtype, S,
    out.entropy != nullptr ? forward<true, S>(out, logits, labels, ignore_index, t, threads)
                           : forward<false, S>(out, logits, labels, ignore_index, t, threads))
}

// d log p_l / dz = 1[l] - p;  d H / dz = -p (log p + H);  times dz/dx = (1 - tanh^2(x / softcap)) / temperature.
template <bool kEntropy, bool kSoftcap, typename S, typename C = typename Storage<S>::C>
static void gradient_row(S* grad, const S* row, int64_t vocab, int64_t label, C g, C g_entropy, C max, C sum,
                         C entropy, const RowTransform<C>& transform) {
  constexpr int64_t L = lanes<C>;
  if (g != g) g = C(__builtin_nan(""));  // see Storage<bfloat16>::store_pair
  const C shift = is_neg_inf(max) ? C(0) : max, inv_sum = sum == 0 ? C(0) : C(1) / sum;
  const C log_sum = kEntropy && sum != 0 ? C(__builtin_log(double(sum))) : C(0);
  const C to_z = kSoftcap ? transform.softcap * transform.inv_temperature : transform.inv_temperature;
  const C scale = -g * inv_sum * transform.inv_temperature;  // of exp(z - max), in the gradient without `hit`
  const C entropy_scale = -g_entropy * inv_sum * transform.inv_temperature;
  const auto of = [&](vec<C> x, C hit) {
    vec<C> slope = {};
    if constexpr (kSoftcap) {
      x = tanh<C>(x * transform.inv_softcap);
      slope = C(1) - x * x;
    }
    const vec<C> d = x * to_z - shift;
    const vec<C> e = exp_nonpositive(d);
    vec<C> out = e * scale + hit * g * transform.inv_temperature;
    if constexpr (kEntropy) {
      constexpr C kLow = sizeof(C) == 4 ? C(-100) : C(-800);  // e is 0 there, and 0 * kLow is not NaN
      out += e * entropy_scale * (at_least<C>(kLow, d) - log_sum + entropy);
    }
    if constexpr (kSoftcap) out *= slope;
    return out;
  };
  int64_t i = 0;
  for (; i + 2 * L <= vocab; i += 2 * L) {
    const char* ahead = reinterpret_cast<const char*>(row + i + kBlock);
    for (int64_t byte = 0; byte < int64_t(2 * L * sizeof(S)); byte += 64) __builtin_prefetch(ahead + byte);
    vec<C> a, b;
    Storage<S>::load_pair(row + i, a, b);
    Storage<S>::store_pair(grad + i, of(a, C(0)), of(b, C(0)));
  }
  for (; i < vocab; ++i) grad[i] = Storage<S>::narrow(of(splat<C>(Storage<S>::widen(row[i])), C(0))[0]);
  if (sum != 0) grad[label] = Storage<S>::narrow(of(splat<C>(Storage<S>::widen(row[label])), C(1))[0]);
}

template <typename S>
static void backward(S* grad_logits, const LogprobGradients& grads, const Rows& logits, const int64_t* labels,
                     int64_t ignore_index, const Transform& t, int threads) {
  using C = typename Storage<S>::C;
  const RowTransform<C> transform(t);
  const C *g = static_cast<const C*>(grads.grad_log_probs), *g_entropy = static_cast<const C*>(grads.grad_entropy);
  const C *max = static_cast<const C*>(grads.max), *sum = static_cast<const C*>(grads.sum);
  const C* entropy = static_cast<const C*>(grads.entropy);
  const bool softcap = t.softcap != 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < logits.count; ++r) {
    S* grad = grad_logits + r * logits.vocab;
    const S* row = logits.row<S>(r);
    const C gh = g_entropy != nullptr ? g_entropy[r] : C(0);
    if (labels[r] == ignore_index || (g[r] == 0 && gh == 0)) {
      __builtin_memset(static_cast<void*>(grad), 0, size_t(logits.vocab) * sizeof(S));
    } else if (gh != 0) {
      softcap ? gradient_row<true, true>(grad, row, logits.vocab, labels[r], g[r], gh, max[r], sum[r], entropy[r], transform)
              : gradient_row<true, false>(grad, row, logits.vocab, labels[r], g[r], gh, max[r], sum[r], entropy[r], transform);
    } else {
      softcap ? gradient_row<false, true>(grad, row, logits.vocab, labels[r], g[r], gh, max[r], sum[r], C(0), transform)
              : gradient_row<false, false>(grad, row, logits.vocab, labels[r], g[r], gh, max[r], sum[r], C(0), transform);
    }
  }
}

void token_logprobs_backward(void* grad_logits, const LogprobGradients& grads, const Rows& logits,
                             const int64_t* labels, int64_t ignore_index, const Transform& t, int threads) {
  FASTALIGN_SWITCH(logits.dtype, S,
    backward<S>(static_cast<S*>(grad_logits), grads, logits, labels, ignore_index, t, threads))
}

}  // namespace fastalign::FASTALIGN_LEVEL
