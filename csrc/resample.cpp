// resample: rows shared out over the threads or, where there are few and long ones, each row over all of them. Built
// once per level.
#include "resample.h"

#include "resample_largest.h"
#include "resample_mass.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr int64_t kLongRow = 1 << 15;  // from here on the threads share a row, where there are fewer rows than threads

template <typename S, typename Draw>
static bool resample_rows(int64_t* ids, const Rows& log_weights, const ResampleOptions& o, int threads) {
  const int64_t n = log_weights.vocab, rows = log_weights.count;
  const bool shared = rows < threads && n >= kLongRow;
  const int of_rows = shared ? 1 : int(rows < threads ? rows : threads), of_each = shared ? threads : 1;
  bool enough = true;
#pragma omp parallel num_threads(of_rows) if (of_rows > 1) reduction(&& : enough)
  {
    Draw draw(n, o, of_each);
    const Memory<double> tops(of_each);
    enough = draw.enough() && tops.enough;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      if (!enough) continue;
      const Row<S> row = {log_weights.row<S>(r), o.mask != nullptr ? o.mask + r * n : nullptr, n};
      const double top = row.top(of_each, tops.data);
      if (top > kMinusInfinity && top < -kMinusInfinity) {
        draw.draw(ids + r * o.k, row, top, uint64_t(r));
      } else {
        for (int64_t j = 0; j < o.k; ++j) ids[r * o.k + j] = -1;
      }
    }
  }
  return enough;
}

template <typename S>
static bool resample_by(int64_t* ids, const Rows& log_weights, const ResampleOptions& o, int threads) {
  switch (o.method) {
    case ResampleMethod::gumbel_top_k: return resample_rows<S, Perturbed<S>>(ids, log_weights, o, threads);
    case ResampleMethod::best: return resample_rows<S, Best<S>>(ids, log_weights, o, threads);
    default: return resample_rows<S, FromMass<S>>(ids, log_weights, o, threads);
  }
}

bool resample(int64_t* ids, const Rows& log_weights, const ResampleOptions& o, int threads) {
  if (log_weights.count == 0) return true;
  return log_weights.dtype == DType::float64 ? resample_by<double>(ids, log_weights, o, threads)
                                             : resample_by<float>(ids, log_weights, o, threads);
}

}  // namespace fastalign::FASTALIGN_LEVEL
