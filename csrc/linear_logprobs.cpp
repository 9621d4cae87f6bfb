// The epilogues of the fused head: one pass over a tile of logits. Built once per level.
#include "linear_logprobs.h"

#include <type_traits>

#include "softmax.h"

namespace fastalign::FASTALIGN_LEVEL {

template <typename C> static void add_bias(C* row, const C* bias, int64_t n) {
  constexpr int64_t L = lanes<C>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store<C>(row + i, load<C>(row + i) + load<C>(bias + i));
  for (; i < n; ++i) row[i] += bias[i];
}

// row := exp(z - max) (1 - tanh^2)
template <typename C> static void exponentials(C* row, int64_t n, C max, const RowTransform<C>& transform) {
  constexpr int64_t L = lanes<C>;
  const C shift = is_neg_inf(max) ? C(0) : max;
  const auto of = [&](vec<C> x) {
    if (transform.softcap == 0) return exp_nonpositive(x * transform.to_z - shift);
    x = tanh<C>(x * transform.to_cap);
    return exp_nonpositive(x * (transform.softcap * transform.to_z) - shift) * (C(1) - x * x);
  };
  int64_t i = 0;
  for (; i + L <= n; i += L) store<C>(row + i, of(load<C>(row + i)));
  for (; i < n; ++i) row[i] = of(splat<C>(row[i]))[0];
}

template <bool kAll, typename C>
static void forward(const HeadTile& tile, const C* bias, C* stats, int64_t stride, C* rescale, int threads) {
  const RowTransform<C> transform(tile.transform);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < tile.rows; ++r) {
    C *row = static_cast<C*>(tile.data) + r * tile.cols, *at = stats + r;
    if (bias != nullptr) add_bias(row, bias, tile.cols);
    SoftmaxStats<C> now;
    now.max = at[0], now.sum = at[stride], now.label_logit = at[2 * stride];
    if constexpr (kAll) {
      now.weighted = at[3 * stride], now.squares = at[4 * stride], now.total = at[5 * stride];
      now.max_before_label = at[6 * stride];
    }
    softmax_add<kAll>(now, row, tile.cols, tile.labels[r] - tile.first, transform);
    if (rescale != nullptr) {
      rescale[r] = now.max == at[0] ? C(1) : is_neg_inf(at[0]) ? C(0) : exp(at[0] - now.max);
      exponentials(row, tile.cols, now.max, transform);
    }
    at[0] = now.max, at[stride] = now.sum, at[2 * stride] = now.label_logit;
    if constexpr (kAll) {
      at[3 * stride] = now.weighted, at[4 * stride] = now.squares, at[5 * stride] = now.total;
      at[6 * stride] = now.max_before_label;
    }
  }
}

template <bool kFilter, typename C>
static void backward(const HeadTile& tile, const C* logits, const C* bias, const C* rows, int64_t stride, C filter,
                     bool* kept, int threads) {
  const RowTransform<C> transform(tile.transform);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t slice = 0; slice < threads; ++slice) {
    for (int64_t r = slice * tile.rows / threads; r < (slice + 1) * tile.rows / threads; ++r) {
      C* row = static_cast<C*>(tile.data) + r * tile.cols;
      const C *from = logits != nullptr ? logits + r * tile.cols : row, *at = rows + r;
      if (at[0] == 0 && at[stride] == 0) {  // for any logits
        __builtin_memset(row, 0, size_t(tile.cols) * sizeof(C));
        continue;
      }
      if (logits == nullptr && bias != nullptr) add_bias(row, bias, tile.cols);
      const SoftmaxGradient<C> in = {at[0], at[stride], at[2 * stride], at[3 * stride], at[4 * stride], filter};
      softmax_gradient<kFilter>(row, from, tile.cols, tile.labels[r] - tile.first, in, transform);
      if constexpr (kFilter) {
        bool* seen = kept + slice * tile.cols;
        for (int64_t i = 0; i < tile.cols; ++i) seen[i] |= row[i] != 0;
      }
    }
  }
}

void head_forward(const HeadTile& tile, const void* bias, void* stats, int64_t stride, bool all, void* rescale,
                  int threads) {
  const auto run = [&](auto* s) {
    using C = std::remove_pointer_t<decltype(s)>;
    const C* b = static_cast<const C*>(bias);
    all ? forward<true, C>(tile, b, s, stride, static_cast<C*>(rescale), threads)
        : forward<false, C>(tile, b, s, stride, static_cast<C*>(rescale), threads);
  };
  tile.dtype == DType::float64 ? run(static_cast<double*>(stats)) : run(static_cast<float*>(stats));
}

void head_backward(const HeadTile& tile, const void* logits, const void* bias, const void* rows, int64_t stride,
                   double filter, bool* kept, int threads) {
  const auto run = [&](auto* in) {
    using C = std::remove_const_t<std::remove_pointer_t<decltype(in)>>;
    const C *l = static_cast<const C*>(logits), *b = static_cast<const C*>(bias);
    filter != 0 ? backward<true, C>(tile, l, b, in, stride, C(filter), kept, threads)
                : backward<false, C>(tile, l, b, in, stride, C(0), kept, threads);
  };
  tile.dtype == DType::float64 ? run(static_cast<const double*>(rows)) : run(static_cast<const float*>(rows));
}

}  // namespace fastalign::FASTALIGN_LEVEL
