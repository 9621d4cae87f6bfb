// The pass over the rewards: chunk by chunk, each chunk read once by one thread for all lambdas, giving the moments
// that map_statistics.h describes. Included by the per-level files alone (see isa.h).
//
// A group that fits in a tile is summed there relative to its own maximum, next to its neighbours. A larger group (such
// as all rows in the joint form) is cut into pieces whose sums are merged. Rewards may differ far less within a group
// than between groups and would lose digits relative to a common center, so each group is summed relative to its first
// row.
#pragma once

#include "thread_pool.h"
#include "map_tile.h"

namespace fastalign::FASTALIGN_LEVEL {

// Rows of a chunk, unless a group ends later. It determines the rounding, so it is a constant.
constexpr int64_t kChunkRows = 1024;

// Groups [group, group + groups), each of which fits in a tile; or, with none, the rows [begin, end) of a larger one.
struct Chunk {
  int64_t group, groups, begin, end;
};

class Pass {
 public:
  const MapInput in;
  const int64_t m, moments;
  int64_t chunks = 0;

  // For up to `count` lambdas and up to `threads` threads; it uses as few of each as pays.
  Pass(const MapInput& input, int64_t count, int threads_given)
      : in(input), m(in.m), moments(3 + m + m * m), groups_(in.offsets != nullptr ? in.groups : 1),
        size_(Total::size(m) > moments ? Total::size(m) : moments) {
    chunk_ = static_cast<Chunk*>(std::malloc(size_t(groups_ + in.n / kChunkRows + 1) * sizeof(Chunk)));
    cut_up();
    // As many lambdas per read as have their sums fit in the caches, for any K.
    most_ = at_most(count, (int64_t(1) << 22) / ((chunks + kLanes) * size_) + 1);
    // A thread is woken only for at least a tenth of a millisecond of work.
    threads = int(at_most(at_most(threads_given, chunks), 1 + ((in.n * (m + 4) * (m + 4) * count) >> 21)));
    room_ = Tile::size(m) + Partial::size(m) + Tile::width_for(m) / kLanes * m + m + most_ * Partial::size(m);
    room_ = (room_ + 7) / 8 * 8;
    memory_ = allocate_zeros<double>(threads * room_);
    sums_ = allocate_zeros<double>(chunks * most_ * size_ + size_);
  }
  Pass(const Pass&) = delete;
  ~Pass() {
    std::free(chunk_);
    std::free(memory_);
    std::free(sums_);
  }
  int threads;

  // out (count, moments) at lambda (count, m), from every stride-th chunk.
  void run(double* out, const double* lambda, int64_t count, int64_t stride, ThreadPool& pool) const {
    const int64_t here = (chunks + stride - 1) / stride;
    for (int64_t k = 0; k < count; k += most_) {
      const double* at = lambda + k * m;
      const int64_t some = at_most(most_, count - k);
      pool.for_each(here, [&](int thread, int64_t i) {
        if (in.dtype == DType::float64) sum_chunk<double>(i * stride, at, some, thread);
        else sum_chunk<float>(i * stride, at, some, thread);
      });
      for (int64_t j = 0; j < some; ++j) collect(out + (k + j) * moments, at + j * m, j, stride);
    }
  }

 private:
  const int64_t groups_, size_;
  int64_t most_, room_;
  Chunk* chunk_;
  double *memory_, *sums_;

  int64_t begin_of(int64_t g) const { return in.offsets != nullptr ? in.offsets[g] : g * in.n; }
  double* sums_of(int64_t c, int64_t k) const { return sums_ + (c * most_ + k) * size_; }

  void cut_up() {
    const int64_t width = Tile::width_for(m);
    for (int64_t g = 0; g < groups_;) {
      const int64_t begin = begin_of(g), first = g;
      while (g < groups_ && begin_of(g + 1) - begin_of(g) <= width && (g == first || begin_of(g + 1) - begin <= kChunkRows)) ++g;
      if (g > first) {
        chunk_[chunks++] = {first, g - first, begin, begin_of(g)};
        continue;
      }
      const int64_t end = begin_of(++g);
      for (int64_t at = begin; at < end; at += kChunkRows) chunk_[chunks++] = {first, 0, at, at_most(at + kChunkRows, end)};
    }
  }

  // center <- the point relative to which group g is summed, moved <- its difference from in.center
  template <typename S> void center_of(double* center, double* moved, int64_t g) const {
    const S* row = row_of<S>(in, begin_of(g));
    for (int64_t j = 0; j < m; ++j) {
      center[j] = in.offsets != nullptr ? double(row[j]) : in.center[j];
      moved[j] = center[j] - in.center[j];
    }
  }

  template <typename S> void sum_chunk(int64_t c, const double* lambda, int64_t count, int thread) const {
    const Chunk& chunk = chunk_[c];
    double* at = memory_ + thread * room_;
    const auto take = [&](int64_t size) { double* given = at; at += size; return given; };
    Tile tile(take(Tile::size(m)), m);
    const Partial own(take(Partial::size(m)), m);
    double *const partials = take(count * Partial::size(m)), *const moved = take(tile.width / kLanes * m), *const center = take(m);
    const auto partial = [&](int64_t k) { return Partial(partials + k * Partial::size(m), m); };
    for (int64_t k = 0; k < count; ++k) partial(k).clear();
    const auto sum_tile = [&](const auto& add) {
      with_values(m, [&](auto M) {
        for (int64_t k = 0; k < count; ++k) {
          add(M, k);
          add_gram<M>(partial(k).gram, tile, m);
        }
      });
      tile.padded = 0;
    };
    if (chunk.groups == 0) {
      center_of<S>(center, moved, chunk.group);
      for (int64_t i = chunk.begin; i < chunk.end; i += tile.width) {
        load_rows<S>(tile, in, i, at_most(i + tile.width, chunk.end), center);
        sum_tile([&](auto M, int64_t k) { add_piece<M>(partial(k), tile, lambda + k * m); });
      }
      for (int64_t k = 0; k < count; ++k) add_up(Total(sums_of(c, k), m), partial(k));
      return;
    }
    for (int64_t k = 0; k < count; ++k) std::memset(sums_of(c, k), 0, size_t(moments) * sizeof(double));
    for (int64_t g = chunk.group, end = g + chunk.groups; g < end;) {
      const int64_t first = g;
      for (; g < end && tile.padded + whole_vectors(begin_of(g + 1) - begin_of(g)) <= tile.width; ++g) {
        center_of<S>(center, moved + (g - first) * m, g);
        load_rows<S>(tile, in, begin_of(g), begin_of(g + 1), center);
      }
      sum_tile([&](auto M, int64_t k) { add_groups<M>(sums_of(c, k), own, tile, lambda + k * m, moved, first, g); });
    }
    for (int64_t k = 0; k < count; ++k) {
      double *cov = sums_of(c, k) + 3 + m, *gram = partial(k).gram;
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = i; j < m; ++j, gram += kLanes) cov[i * m + j] += add_lanes(gram);
      }
    }
  }

  // Adds a tile of one group; its e remain in the scores.
  template <int M> void add_piece(const Partial& sums, const Tile& tile, const double* lambda) const {
    double best, top;
    score_rows<M>(best, top, tile, 0, tile.padded, lambda, m, in.log_weights != nullptr);
    if (top > *sums.top) *sums.top = top;
    if (best > *sums.shift) {
      sums.rescale(rescale(*sums.shift, best));
      *sums.shift = best;
    }
    exp_rows<M>(sums, tile, 0, tile.padded, *sums.shift == -kInf ? 0.0 : *sums.shift, m);
  }

  // out += the moments of the groups [first, end) in the tile (of the covariance, only the part due to their means);
  // their distributions remain in the scores.
  template <int M>
  void add_groups(double* out, const Partial& own, const Tile& tile, const double* lambda, const double* moved, int64_t first,
                  int64_t end) const {
    double *mean = out + 3, *cov = mean + m, *own_mean = own.gram;
    double product = 1;  // of the masses of at most 1,024 rows: no overflow
    int64_t begin = 0;
    for (int64_t g = first; g < end; ++g, moved += m) {
      const int64_t till = begin + whole_vectors(begin_of(g + 1) - begin_of(g));
      double best, top, score = 0;
      score_rows<M>(best, top, tile, begin, till, lambda, m, in.log_weights != nullptr);
      for (int64_t i = 0; i < kLanes * (M > 0 ? M + 2 : m + 2); ++i) own.squares[i] = 0;
      exp_rows<M>(own, tile, begin, till, best == -kInf ? 0.0 : best, m);
      const double total = add_lanes(own.first), inverse = 1 / total;
      for (; begin < till; begin += kLanes) store<double>(tile.scores + begin, load<double>(tile.scores + begin) * inverse);
      for (int64_t j = 0; j < (M > 0 ? M : m); ++j) {
        own_mean[j] = add_lanes(own.first + (j + 1) * kLanes) * inverse;
        score += lambda[j] * moved[j];
        mean[j] += own_mean[j] + moved[j];
        for (int64_t i = 0; i <= j; ++i) cov[i * m + j] -= own_mean[i] * own_mean[j];
      }
      product *= total;
      out[0] += (best == -kInf ? 0.0 : best) + score;
      out[1] += total * total / add_lanes(own.squares);
      out[2] += total == total ? top + score : total;
    }
    out[0] += __builtin_log(product);
  }

  // out += the moments of a group from its merged pieces
  template <typename S> void add_total(double* out, const Total& sums, const double* lambda, int64_t g) const {
    const double total = *sums.first;
    double *mean = out + 3, *cov = mean + m, *const center = memory_, *const moved = memory_ + m, score = 0;
    center_of<S>(center, moved, g);
    for (int64_t j = 0; j < m; ++j) {
      score += lambda[j] * moved[j];
      mean[j] += sums.first[j + 1] / total + moved[j];
    }
    out[0] += (*sums.shift == -kInf ? 0.0 : *sums.shift) + __builtin_log(total) + score;
    out[1] += total * total / *sums.squares;
    out[2] += total == total ? *sums.top + score : total;
    const double* second = sums.gram;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = i; j < m; ++j) {
        cov[i * m + j] += *second++ / total - (sums.first[i + 1] / total) * (sums.first[j + 1] / total);
      }
    }
  }

  // out <- the mean over the groups of what every stride-th chunk holds of the k-th lambda
  void collect(double* out, const double* lambda, int64_t k, int64_t stride) const {
    int64_t seen = 0;
    for (int64_t i = 0; i < moments; ++i) out[i] = 0;
    for (int64_t c = 0; c < chunks;) {
      const Chunk& chunk = chunk_[c];
      double* const sums = sums_of(c, k);
      c += stride;
      if (chunk.groups > 0) {
        for (int64_t i = 0; i < moments; ++i) out[i] += sums[i];
        seen += chunk.groups;
        continue;
      }
      const Total total(sums, m);
      for (; c < chunks && chunk_[c].groups == 0 && chunk_[c].group == chunk.group; c += stride) merge(total, Total(sums_of(c, k), m));
      if (in.dtype == DType::float64) add_total<double>(out, total, lambda, chunk.group);
      else add_total<float>(out, total, lambda, chunk.group);
      ++seen;
    }
    for (int64_t i = 0; i < 3 + m; ++i) out[i] /= double(seen);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = i; j < m; ++j) {
        double* cov = out + 3 + m;
        cov[i * m + j] /= double(seen);
        cov[j * m + i] = cov[i * m + j];
      }
    }
  }
};

}  // namespace fastalign::FASTALIGN_LEVEL
