// One pass over a row of logits: its maximum, the sum of exponentials and, on request, the other statistics.
// Included only by the per-level files.
#pragma once

#include "rows.h"
#include "simd.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr int64_t kBlock = 1024;  // of the compute type: a block stays in the L1 cache between its two reads

// The transform with its constants in the compute type.
template <typename C> struct RowTransform {
  C softcap, to_cap;  // the softcap, and what x is multiplied by before tanh
  C to_z;             // what x, or the capped x, is multiplied by
  C slope;            // dz/dx without a softcap; with one, at x = 0
  bool identity;

  explicit RowTransform(const Transform& t)
      : softcap(C(t.softcap)), to_cap(t.softcap != 0 ? C(t.logit_scale / t.softcap) : C(0)),
        to_z(C((t.softcap != 0 ? 1 : t.logit_scale) / t.temperature)), slope(C(t.logit_scale / t.temperature)),
        identity(t.softcap == 0 && t.temperature == 1 && t.logit_scale == 1) {}

  vec<C> operator()(vec<C> x) const {
    if (softcap != 0) x = softcap * tanh<C>(x * to_cap);
    return x * to_z;
  }
};

// The transformed logits of row[0:n], n <= kBlock, padded to whole groups of four vectors with -inf. Returns their
// address: `buffer`, or the row itself if the transform is the identity. Unless kOrdered, the elements of a pair of
// vectors may be interleaved.
template <bool kOrdered = true, typename S, typename C>
inline const C* transformed_block(const S* row, int64_t n, const RowTransform<C>& transform, C* buffer) {
  constexpr int64_t L = lanes<C>;
  if constexpr (sizeof(S) == sizeof(C)) {
    if (transform.identity && n % (4 * L) == 0) return reinterpret_cast<const C*>(row);
  }
  int64_t i = 0;
  if (!kOrdered && transform.identity) {
    for (; i + 2 * L <= n; i += 2 * L) {
      vec<C> a, b;
      Storage<S>::load_pair(row + i, a, b);
      store<C>(buffer + i, a);
      store<C>(buffer + i + L, b);
    }
  }
  for (; i + L <= n; i += L) store<C>(buffer + i, transform(Storage<S>::load_wide(row + i)));
  if (i < n) {
    vec<C> last = splat<C>(C(-__builtin_inf()));
    for (int64_t k = i; k < n; ++k) last[k - i] = Storage<S>::widen(row[k]);
    last = transform(last);
    for (int64_t k = n - i; k < L; ++k) last[k] = C(-__builtin_inf());  // a softcap makes -inf finite
    store<C>(buffer + i, last);
    i += L;
  }
  for (; i % (4 * L) != 0; i += L) store<C>(buffer + i, splat<C>(C(-__builtin_inf())));
  return buffer;
}

template <typename C> inline C block_max(const C* z, int64_t n) {
  constexpr int64_t L = lanes<C>;
  vec<C> m0 = splat<C>(C(-__builtin_inf())), m1 = m0, m2 = m0, m3 = m0;
  for (int64_t i = 0; i < n; i += 4 * L) {
    m0 = max<C>(m0, load<C>(z + i));
    m1 = max<C>(m1, load<C>(z + i + L));
    m2 = max<C>(m2, load<C>(z + i + 2 * L));
    m3 = max<C>(m3, load<C>(z + i + 3 * L));
  }
  return reduce_max<C>(max<C>(max<C>(m0, m1), max<C>(m2, m3)));
}

// Sum of exp(z - shift). Meanwhile prefetches `next`, the row's next block, so that memory is read while exp is
// computed (the pass over rows in memory takes a third less time); prefetching an invalid address is not a fault.
template <typename C, typename S = C>
inline C block_sum_exp(const C* z, int64_t n, C shift, const S* next = nullptr) {
  constexpr int64_t L = lanes<C>, kLine = 64;
  vec<C> s0 = {}, s1 = {}, s2 = {}, s3 = {};
  for (int64_t i = 0; i < n; i += 4 * L) {
    const char* ahead = reinterpret_cast<const char*>(next + i);
    for (int64_t byte = 0; byte < int64_t(4 * L * sizeof(S)); byte += kLine) __builtin_prefetch(ahead + byte);
    s0 += exp_nonpositive(load<C>(z + i) - shift);
    s1 += exp_nonpositive(load<C>(z + i + L) - shift);
    s2 += exp_nonpositive(load<C>(z + i + 2 * L) - shift);
    s3 += exp_nonpositive(load<C>(z + i + 3 * L) - shift);
  }
  return reduce_add<C>((s0 + s1) + (s2 + s3));
}

inline int64_t padded(int64_t n, int64_t group) { return (n + group - 1) / group * group; }
template <typename C> inline bool is_neg_inf(C x) { return x == C(-__builtin_inf()); }

template <typename C> struct SoftmaxStats {
  C max = C(-__builtin_inf());
  C sum = 0;         // of exp(z - max); 0 where every logit is -inf
  C label_logit = 0; // z at the label
  // Only with kAll:
  C weighted = 0;    // sum of exp(z - max) (z - max)
  C squares = 0;     // sum of exp(2 (z - max))
  C total = 0;       // sum of z
  C max_before_label = C(-__builtin_inf());
};

// Adds row[0:vocab], which follows the part already in `stats`. label: its index in this part, or outside it.
template <bool kAll, typename S, typename C = typename Storage<S>::C>
void softmax_add(SoftmaxStats<C>& stats, const S* row, int64_t vocab, int64_t label, const RowTransform<C>& transform) {
  constexpr int64_t L = lanes<C>;
  alignas(64) C buffer[kBlock];
  if (label >= 0 && label < vocab) stats.label_logit = transform(splat<C>(Storage<S>::widen(row[label])))[0];
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = vocab - start < kBlock ? vocab - start : kBlock, full = padded(n, 4 * L);
    const C* z = transformed_block<kAll>(row + start, n, transform, buffer);
    const C top = block_max<C>(z, full);
    if constexpr (kAll) {
      if (label >= start && label < start + n) {
        C before = stats.max;
        for (int64_t k = 0; k < label - start; ++k) before = z[k] > before ? z[k] : before;
        stats.max_before_label = before;
      }
    }
    if (top > stats.max) {
      const C drop = stats.max - top;  // rescale what was summed against the smaller maximum
      const C scale = is_neg_inf(stats.max) ? C(stats.sum == stats.sum ? 0 : stats.sum) : exp(drop);
      if constexpr (kAll) {
        if (!is_neg_inf(stats.max)) stats.weighted = scale * (stats.weighted + drop * stats.sum);
        stats.squares *= scale * scale;
      }
      stats.sum *= scale;
      stats.max = top;
    }
    const C shift = is_neg_inf(stats.max) ? C(0) : stats.max;
    if constexpr (!kAll) {
      stats.sum += block_sum_exp<C, S>(z, full, shift, row + start + n);
    } else {
      vec<C> sum = {}, weighted = {}, squares = {}, total = {};
      constexpr C kLow = sizeof(C) == 4 ? C(-100) : C(-800);  // exp is 0 there, and 0 * kLow is not NaN
      for (int64_t i = 0; i < full; i += L) {
        const vec<C> x = load<C>(z + i);
        vec<C> d = x - shift;
        d = at_least<C>(kLow, d);
        const vec<C> e = exp_nonpositive(d);
        sum += e;
        weighted += e * d;
        squares += e * e;
        if (i + L <= n) total += x;
      }
      stats.sum += reduce_add<C>(sum);
      stats.weighted += reduce_add<C>(weighted);
      stats.squares += reduce_add<C>(squares);
      stats.total += reduce_add<C>(total);
      for (int64_t k = n / L * L; k < n; ++k) stats.total += z[k];
    }
  }
}

// label < 0: none.
template <bool kAll, typename S, typename C = typename Storage<S>::C>
SoftmaxStats<C> softmax_stats(const S* row, int64_t vocab, int64_t label, const RowTransform<C>& transform) {
  SoftmaxStats<C> stats;
  softmax_add<kAll>(stats, row, vocab, label, transform);
  return stats;
}

// Inputs of one row's gradient: the incoming gradients, and the forward pass's results.
template <typename C> struct SoftmaxGradient {
  C g, g_entropy, max, sum, entropy;
  C filter = 0;  // entries with p below it count as 0, except the label's
};

// d log p_l / dz = 1[l] - p;  d H / dz = -p (log p + H);  times dz/dx = (1 - tanh^2(s x / softcap)) s / temperature.
// grad may be row itself. A label outside [0, vocab) is in another part of the row.
template <bool kEntropy, bool kSoftcap, bool kFilter, typename S, typename C>
void gradient_row(S* grad, const S* row, int64_t vocab, int64_t label, const SoftmaxGradient<C>& in,
                  const RowTransform<C>& transform) {
  constexpr int64_t L = lanes<C>;
  const C g = in.g == in.g ? in.g : C(__builtin_nan(""));  // see Storage<bfloat16>::store_pair
  const C shift = is_neg_inf(in.max) ? C(0) : in.max, inv_sum = in.sum == 0 ? C(0) : C(1) / in.sum;
  const C log_sum = kEntropy && in.sum != 0 ? C(__builtin_log(double(in.sum))) : C(0);
  const C to_z = kSoftcap ? transform.softcap * transform.to_z : transform.to_z;
  const C scale = -g * inv_sum * transform.slope;  // of exp(z - max), in the gradient without `hit`
  const C entropy_scale = -in.g_entropy * inv_sum * transform.slope;
  const C too_small = in.filter * in.sum;
  const auto of = [&](vec<C> x, C hit) {
    vec<C> slope = {};
    if constexpr (kSoftcap) {
      x = tanh<C>(x * transform.to_cap);
      slope = C(1) - x * x;
    }
    const vec<C> d = x * to_z - shift;
    const vec<C> e = exp_nonpositive(d);
    vec<C> out = e * scale + hit * g * transform.slope;
    if constexpr (kEntropy) {
      constexpr C kLow = sizeof(C) == 4 ? C(-100) : C(-800);  // e is 0 there, and 0 * kLow is not NaN
      out += e * entropy_scale * (at_least<C>(kLow, d) - log_sum + in.entropy);
    }
    if constexpr (kSoftcap) out *= slope;
    if constexpr (kFilter) {
      if (hit == 0) out = e < too_small ? vec<C>{} : out;
    }
    return out;
  };
  const bool has_label = label >= 0 && label < vocab && in.sum != 0;
  const C label_logit = has_label ? C(Storage<S>::widen(row[label])) : C(0);
  int64_t i = 0;
  for (; i + 2 * L <= vocab; i += 2 * L) {
    const char* ahead = reinterpret_cast<const char*>(row + i + kBlock);
    for (int64_t byte = 0; byte < int64_t(2 * L * sizeof(S)); byte += 64) __builtin_prefetch(ahead + byte);
    vec<C> a, b;
    Storage<S>::load_pair(row + i, a, b);
    Storage<S>::store_pair(grad + i, of(a, C(0)), of(b, C(0)));
  }
  for (; i < vocab; ++i) grad[i] = Storage<S>::narrow(of(splat<C>(Storage<S>::widen(row[i])), C(0))[0]);
  if (has_label) grad[label] = Storage<S>::narrow(of(splat<C>(label_logit), C(1))[0]);
}

template <bool kFilter = false, typename S, typename C>
void softmax_gradient(S* grad, const S* row, int64_t vocab, int64_t label, const SoftmaxGradient<C>& in,
                      const RowTransform<C>& transform) {
  const bool softcap = transform.softcap != 0;
  if (in.g_entropy != 0) {
    softcap ? gradient_row<true, true, kFilter>(grad, row, vocab, label, in, transform)
            : gradient_row<true, false, kFilter>(grad, row, vocab, label, in, transform);
  } else {
    softcap ? gradient_row<false, true, kFilter>(grad, row, vocab, label, in, transform)
            : gradient_row<false, false, kFilter>(grad, row, vocab, label, in, transform);
  }
}

// log p of the label: exactly 0 where the whole row is -inf (a fully masked vocabulary).
template <typename C> inline C label_logprob(const SoftmaxStats<C>& stats) {
  if (stats.sum == 0 && is_neg_inf(stats.max)) return 0;
  return (stats.label_logit - stats.max) - C(__builtin_log(double(stats.sum)));
}

}  // namespace fastalign::FASTALIGN_LEVEL
