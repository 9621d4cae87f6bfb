// map_statistics: tiles of rows as columns of doubles in L1 (map_tile.h), from which every lambda takes its sums.
#include "crew.h"
#include "map_tile.h"

namespace fastalign::FASTALIGN_LEVEL {

// totals (count,) <- the rows [begin, end) under every lambda
template <typename S>
static void sum_rows(double* totals, double* partials, Tile<double>& tile, double* scores,
                     const MapInput& in, int64_t begin, int64_t end,
                     const double* lambda, int64_t count) {
  const int64_t m = in.m, size = Partial<double>::size(m);
  for (int64_t k = 0; k < count; ++k) Partial<double>(partials + k * size, m).clear(m);
  for (int64_t at = begin; at < end; at += tile.width) {
    load_tile<double, S>(tile, in, at, at_most(at + tile.width, end));
    for (int64_t k = 0; k < count; ++k) add_tile(Partial<double>(partials + k * size, m), tile, scores, lambda + k * m, m, true);
  }
  for (int64_t k = 0; k < count; ++k) add_up(Total(totals + k * Total::size(m), m), Partial<double>(partials + k * size, m), m);
}

// out += the moments that the sums stand for, about `moved` less than their own center (null: nothing less)
static void add_moments(double* out, const Total& sums, int64_t m, const double* moved, const double* lambda) {
  double total = sums.gram[0], score = 0;
  for (int64_t j = 1; j <= m; ++j) total += 0 * sums.gram[j];  // at lambda = 0 no score has told of a NaN
  for (int64_t j = 0; moved != nullptr && j < m; ++j) {
    score += lambda[j] * moved[j];
    out[3 + j] += moved[j];
  }
  out[0] += (*sums.shift == -kInf ? 0.0 : *sums.shift) + __builtin_log(total) + score;
  out[1] += total * total / *sums.squares;
  out[2] += total == total ? *sums.top + score : total;
  double *mean = out + 3, *cov = mean + m;
  const double* second = sums.gram + m + 1;
  for (int64_t j = 0; j < m; ++j) mean[j] += sums.gram[j + 1] / total;
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t k = j; k < m; ++k) {
      const double c = *second++ / total - (sums.gram[j + 1] / total) * (sums.gram[k + 1] / total);
      cov[j * m + k] += c;
      if (k != j) cov[k * m + j] += c;
    }
  }
}

// What a thread works in: a tile, the sums in lanes of every lambda, and two rows.
struct Workspace {
  double *memory, *scores, *first, *partials;
  Tile<double> tile;
  Workspace(const MapInput& in, int64_t count)
      : memory(allocate_zeros<double>(Tile<double>::size(in.m) + Tile<double>::width_for(in.m) + (2 * in.m + 7) / 8 * 8 +
                                      count * (Partial<double>::size(in.m) + Total::size(in.m)))),
        scores(memory + Tile<double>::size(in.m)), first(scores + Tile<double>::width_for(in.m)),
        partials(first + (2 * in.m + 7) / 8 * 8), tile(memory, in.m, in.log_weights != nullptr) {}
  Workspace(const Workspace&) = delete;
  ~Workspace() { std::free(memory); }
  double* totals(int64_t m, int64_t count) const { return partials + count * Partial<double>::size(m); }
};

// work(workspace, c) for every c < chunks
template <typename F>
static void in_crew(const MapInput& in, int64_t count, int threads, int64_t chunks, const F& work) {
  Workspace** own = static_cast<Workspace**>(std::malloc(size_t(threads) * sizeof(Workspace*)));
  for (int t = 0; t < threads; ++t) own[t] = new Workspace(in, count);
  Crew::gather(threads, [&](Crew& crew) { crew.each(chunks, [&](int thread, int64_t c) { work(*own[thread], c); }); });
  for (int t = 0; t < threads; ++t) delete own[t];
  std::free(own);
}

template <typename S>
static void joint(double* out, const MapInput& in, const double* lambda, int64_t count, int threads) {
  const int64_t m = in.m, size = Total::size(m), chunks = (in.n + kChunkRows - 1) / kChunkRows;
  double* totals = allocate_zeros<double>(chunks * count * size);
  in_crew(in, count, threads, chunks, [&](Workspace& work, int64_t c) {
    sum_rows<S>(totals + c * count * size, work.partials, work.tile, work.scores, in, c * kChunkRows,
                at_most((c + 1) * kChunkRows, in.n), lambda, count);
  });
  for (int64_t k = 0; k < count; ++k) {
    const Total total(totals + k * size, m);
    for (int64_t c = 1; c < chunks; ++c) merge(total, Total(totals + (c * count + k) * size, m), m);
    add_moments(out + k * (3 + m + m * m), total, m, nullptr, nullptr);
  }
  std::free(totals);
}

template <typename S>
static void grouped(double* out, const MapInput& in, const double* lambda, int64_t count, int threads) {
  const int64_t m = in.m, moments = 3 + m + m * m;
  const int64_t per_chunk = at_most(in.groups, kChunkRows * in.groups / in.n + 1);
  const int64_t chunks = (in.groups + per_chunk - 1) / per_chunk;
  double* partial = allocate_zeros<double>(chunks * count * moments);
  in_crew(in, count, threads, chunks, [&](Workspace& work, int64_t c) {
    double* totals = work.totals(m, count);
    // Each group is summed about its own first row: within a prompt rewards may differ by far less than between
    // prompts, and would lose those digits about a center that is common to all.
    double *first = work.first, *moved = first + m;
    MapInput own = in;
    own.center = first;
    for (int64_t g = c * per_chunk; g < at_most((c + 1) * per_chunk, in.groups); ++g) {
      const S* row = row_of<S>(in, in.offsets[g]);
      for (int64_t j = 0; j < m; ++j) {
        first[j] = double(row[j]);
        moved[j] = first[j] - in.center[j];
      }
      sum_rows<S>(totals, work.partials, work.tile, work.scores, own, in.offsets[g], in.offsets[g + 1], lambda, count);
      for (int64_t k = 0; k < count; ++k) {
        add_moments(partial + (c * count + k) * moments, Total(totals + k * Total::size(m), m), m, moved, lambda + k * m);
      }
    }
  });
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t i = 0; i < count * moments; ++i) out[i] += partial[c * count * moments + i];
  }
  for (int64_t i = 0; i < count * moments; ++i) out[i] /= double(in.groups);
  std::free(partial);
}

void map_statistics(double* out, const MapInput& in, const double* lambda, int64_t count, int threads) {
  const int64_t moments = 3 + in.m + in.m * in.m;
  for (int64_t i = 0; i < count * moments; ++i) out[i] = 0;
  // So many lambdas a read that what they sum up fits in a few caches, whatever K is.
  const int64_t chunks = (in.n + kChunkRows - 1) / kChunkRows, most = (int64_t(1) << 22) / ((chunks + lanes<double>) * moments) + 1;
  // A thread is woken only for a tenth of a millisecond's work or more.
  threads = int(at_most(at_most(threads, chunks), 1 + ((in.n * (in.m + 4) * (in.m + 4) * count) >> 21)));
  const bool wide = in.dtype == DType::float64, by_group = in.offsets != nullptr;
  const auto run = by_group ? (wide ? grouped<double> : grouped<float>) : (wide ? joint<double> : joint<float>);
  for (int64_t k = 0; k < count; k += most) {
    run(out + k * moments, in, lambda + k * in.m, at_most(most, count - k), threads);
  }
}

}  // namespace fastalign::FASTALIGN_LEVEL
