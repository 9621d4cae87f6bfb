// gae: A_t = r_t + gamma V' - V_t + gamma lambda A', where V' and A' belong to the next valid token. Built once per
// level.
//
// Where a whole vector of tokens is valid, the recurrence is solved inside it in log2(lanes) steps (each lane adds c^s
// times the lane s ahead, s = 1, 2, 4, ..), so that vectors depend on each other only through one product and one sum.
#include "gae.h"

#include <utility>

#include "simd.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr int64_t kPlacesPerThread = 1 << 15;  // about 15 us of work; below that a second thread costs more than it saves

// Lanes kBy .. L - 1 of x, then the first kBy of `after`.
template <int kBy, typename C, std::size_t... I>
static inline vec<C> lanes_ahead(vec<C> x, vec<C> after, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, after, (I + kBy)...);
#else
  return __builtin_shuffle(x, after, typename Vec<C>::bits{(I + kBy)...});
#endif
}
template <int kBy, typename C> static inline vec<C> ahead(vec<C> x, vec<C> after) {
  return lanes_ahead<kBy, C>(x, after, std::make_index_sequence<std::size_t(lanes<C>)>());
}

// x_i + c x_{i+1} + c^2 x_{i+2} + .. over the lanes that follow; power[s] = c^s.
template <int kStep, typename C> static inline vec<C> scan(vec<C> x, const C* power) {
  if constexpr (kStep < lanes<C>) {
    return scan<2 * kStep, C>(x + power[kStep] * ahead<kStep, C>(x, vec<C>{}), power);
  } else {
    return x;
  }
}

template <typename C> static void gae_rows(C* advantages, C* returns, const GaeInput& in, int threads) {
  constexpr int64_t L = lanes<C>;
  const int64_t length = in.rewards.vocab;
  const C gamma = C(in.gamma), decay = C(in.gamma * in.lambda);
  C power[L + 1];  // of gamma lambda
  vec<C> carried = {};
  double exact = 1;
  for (int64_t s = 0; s <= L; ++s, exact *= in.gamma * in.lambda) {
    power[s] = C(exact);
    if (s > 0) carried[L - s] = C(exact);
  }
  bool ones[L];
  for (bool& one : ones) one = true;
  const int64_t worth = in.rewards.count * length / kPlacesPerThread;
  threads = worth < threads ? (worth < 1 ? 1 : int(worth)) : threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < in.rewards.count; ++row) {
    const C *r = in.rewards.row<C>(row), *v = in.values.row<C>(row);
    const bool* valid = in.mask + row * length;
    C *advantage = advantages + row * length, *target = returns + row * length;
    C next_value = 0, next_advantage = 0;
    int64_t t = length;
    while (t > 0) {
      if (t >= L && __builtin_memcmp(valid + t - L, ones, size_t(L)) == 0) {
        t -= L;
        const vec<C> value = load<C>(v + t);
        const vec<C> delta = load<C>(r + t) + gamma * ahead<1, C>(value, splat<C>(next_value)) - value;
        const vec<C> a = scan<1, C>(delta, power) + carried * next_advantage;
        store<C>(advantage + t, a);
        store<C>(target + t, a + value);
        next_value = value[0];
        next_advantage = a[0];
      } else if (valid[--t]) {
        next_advantage = r[t] + gamma * next_value - v[t] + decay * next_advantage;
        next_value = v[t];
        advantage[t] = next_advantage;
        target[t] = next_advantage + next_value;
      } else {
        advantage[t] = target[t] = 0;
      }
    }
  }
}

void gae(void* advantages, void* returns, const GaeInput& in, int threads) {
  if (in.rewards.dtype == DType::float64) {
    gae_rows(static_cast<double*>(advantages), static_cast<double*>(returns), in, threads);
  } else {
    gae_rows(static_cast<float*>(advantages), static_cast<float*>(returns), in, threads);
  }
}

}  // namespace fastalign::FASTALIGN_LEVEL
