// map_statistics: a tile of rows is turned into double columns in L1; every lambda then takes from it its scores,
// their exp about a running maximum, and the Gram matrix of (1, x_1 .. x_m) under those weights. Built once per level.
#include "map_statistics.h"

#include <cstdlib>

#include "simd.h"

namespace fastalign::FASTALIGN_LEVEL {

typedef vec<double> vecd;
constexpr int64_t kLanes = lanes<double>;
constexpr double kInf = __builtin_inf();
// Rows of the units whose partial sums are merged in order; it fixes the rounding, so it depends on nothing.
constexpr int64_t kChunkRows = 4096;

static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t triangle(int64_t m) { return (m + 1) * (m + 2) / 2; }

// Sums of one lambda over some rows: the shift, the largest score, sum e^2, and the upper triangle of
// sum e (1, x)(1, x)^T row by row, e = w exp(s - shift); the last two in N lanes, to be added up at the end.
template <int64_t N> struct Sums {
  double *shift, *top, *squares, *gram;
  static int64_t size(int64_t m) { return 2 + N * (1 + triangle(m)); }
  explicit Sums(double* at) : shift(at), top(at + 1), squares(at + 2), gram(at + 2 + N) {}
  void clear(int64_t m) const {
    *shift = *top = -kInf;
    for (int64_t i = 0; i < N * (1 + triangle(m)); ++i) squares[i] = 0;
  }
  void scale(int64_t m, double factor) const {
    for (int64_t i = 0; i < N; ++i) squares[i] *= factor * factor;
    for (int64_t i = 0; i < N * triangle(m); ++i) gram[i] *= factor;
  }
};
typedef Sums<kLanes> Partial;
typedef Sums<1> Total;

static double add_lanes(const double* p) {
  typedef double quad __attribute__((vector_size(32), aligned(8), may_alias));
  if constexpr (kLanes == 2) return p[0] + p[1];
  quad q = *reinterpret_cast<const quad*>(p);
  if constexpr (kLanes == 8) q += *reinterpret_cast<const quad*>(p + 4);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

static void add_up(const Total& total, const Partial& partial, int64_t m) {
  *total.shift = *partial.shift;
  *total.top = *partial.top;
  *total.squares = add_lanes(partial.squares);
  for (int64_t i = 0; i < triangle(m); ++i) total.gram[i] = add_lanes(partial.gram + i * kLanes);
}

// exp(from - to) for shifts that may both be -inf (nothing summed yet)
static double rescale(double from, double to) { return from == to ? 1.0 : exp(from - to); }

// A tile: columns of doubles, the first all ones; rows past the last are zeros with score -inf.
struct Tile {
  int64_t rows, padded, width;  // rows held, rounded up to whole vectors, and room
  double *columns, *log_weights, *scores;
  bool weighted;

  static int64_t width_for(int64_t m) { return m <= 16 ? 256 : 64; }
  static int64_t size(int64_t m) { return (m + 3) * width_for(m); }
  Tile(double* memory, int64_t m, bool weighted)
      : rows(0), padded(0), width(width_for(m)), columns(memory), log_weights(memory + (m + 1) * width),
        scores(log_weights + width), weighted(weighted) {
    for (int64_t i = 0; i < width; ++i) columns[i] = 1.0;
  }
  const double* column(int64_t j) const { return columns + j * width; }
};

template <typename S> inline const S* row_of(const MapInput& in, int64_t i) {
  return static_cast<const S*>(in.rewards) + (in.order != nullptr ? in.order[i] : i) * in.row_stride;
}

typedef double quad __attribute__((vector_size(32)));
typedef double quad_at __attribute__((vector_size(32), aligned(8), may_alias));

inline quad widen4(const double* p) { return *reinterpret_cast<const quad_at*>(p); }
inline quad widen4(const float* p) {
#if defined(__AVX__)
  return (quad)_mm256_cvtps_pd(_mm_loadu_ps(p));  // GCC 12 makes two halves of __builtin_convertvector
#else
  return quad{p[0], p[1], p[2], p[3]};
#endif
}

// Four rows and four columns at a time: a strided store for every element would cost more than all the arithmetic.
template <typename S>
inline void transpose_4x4(double* columns, int64_t width, const S* const rows[4], quad c, int64_t kept) {
  typedef int64_t pick __attribute__((vector_size(32)));
  quad r[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) r[k] = widen4(rows[k]) - c;
  const quad even01 = __builtin_shuffle(r[0], r[1], pick{0, 4, 2, 6}), odd01 = __builtin_shuffle(r[0], r[1], pick{1, 5, 3, 7});
  const quad even23 = __builtin_shuffle(r[2], r[3], pick{0, 4, 2, 6}), odd23 = __builtin_shuffle(r[2], r[3], pick{1, 5, 3, 7});
  const auto put = [&](int64_t j, quad x) {
    if (j < kept) *reinterpret_cast<quad_at*>(columns + j * width) = x;
  };
  put(0, __builtin_shuffle(even01, even23, pick{0, 1, 4, 5}));
  put(1, __builtin_shuffle(odd01, odd23, pick{0, 1, 4, 5}));
  put(2, __builtin_shuffle(even01, even23, pick{2, 3, 6, 7}));
  put(3, __builtin_shuffle(odd01, odd23, pick{2, 3, 6, 7}));
}

template <typename S> static void load_tile(Tile& tile, const MapInput& in, int64_t begin, int64_t end) {
  tile.rows = end - begin;
  tile.padded = (tile.rows + kLanes - 1) / kLanes * kLanes;
  const int64_t width = tile.width, m = in.m;
  double* columns = tile.columns + width;
  // Of fewer than four columns, what is read beyond a row lies in the rows after it: not so for the last ones.
  const bool narrow = m < 4;
  quad narrow_center = {};
  for (int64_t j = 0; narrow && j < m; ++j) narrow_center[j] = in.center[j];
  int64_t i = 0;
  for (; i + 4 <= tile.rows; i += 4) {
    const S* rows[4];
    for (int k = 0; k < 4; ++k) rows[k] = row_of<S>(in, begin + i + k);
    // The next tile, while this one is computed with; past the end, or with an order, a prefetch does no harm.
    __builtin_prefetch(rows[0] + width * in.row_stride);
    __builtin_prefetch(rows[2] + width * in.row_stride);
    if (narrow) {
      const S* last = static_cast<const S*>(in.rewards) + (in.n - 4) * in.row_stride;
      if (in.row_stride < m || rows[0] > last || rows[1] > last || rows[2] > last || rows[3] > last) break;
      transpose_4x4<S>(columns + i, width, rows, narrow_center, m);
      continue;
    }
    for (int64_t j = 0;; j = at_most(j + 4, m - 4)) {  // the last block overlaps the one before
      const S* const at[4] = {rows[0] + j, rows[1] + j, rows[2] + j, rows[3] + j};
      transpose_4x4<S>(columns + j * width + i, width, at, widen4(in.center + j), 4);
      if (j == m - 4) break;
    }
  }
  for (; i < tile.rows; ++i) {
    const S* row = row_of<S>(in, begin + i);
    for (int64_t j = 0; j < m; ++j) columns[j * width + i] = double(row[j]) - in.center[j];
  }
  for (; i < tile.padded; ++i) {
    for (int64_t j = 0; j < m; ++j) columns[j * width + i] = 0;
  }
  if (tile.weighted) {
    for (i = 0; i < tile.rows; ++i) tile.log_weights[i] = in.log_weights[in.order != nullptr ? in.order[begin + i] : begin + i];
    for (; i < tile.padded; ++i) tile.log_weights[i] = -kInf;
  }
}

// gram[a..a+A) x [b..b+B) of the triangle: sum over rows of e x_a x_b
template <int A, int B>
static void gram_block(double* gram, const Tile& tile, int64_t m, int64_t a, int64_t b) {
  vecd sums[A][B] = {};
  const double *left = tile.column(a), *right = tile.column(b), *weights = tile.scores;
  const int64_t width = tile.width;
  for (int64_t i = 0; i < tile.padded; i += kLanes) {
    const vecd e = load<double>(weights + i);
    vecd x[B];
#pragma GCC unroll 4
    for (int k = 0; k < B; ++k) x[k] = load<double>(right + k * width + i);
#pragma GCC unroll 4
    for (int j = 0; j < A; ++j) {
      const vecd y = e * load<double>(left + j * width + i);
#pragma GCC unroll 4
      for (int k = 0; k < B; ++k) sums[j][k] += y * x[k];
    }
  }
  for (int j = 0; j < A; ++j) {
    const int64_t row = a + j, start = row * (m + 1) - row * (row - 1) / 2 - row;  // of (row, 0), were it stored
    for (int k = 0; k < B; ++k) {
      if (b + k < row) continue;
      double* at = gram + (start + b + k) * kLanes;
      store<double>(at, load<double>(at) + sums[j][k]);
    }
  }
}

template <int A> static void gram_rows(double* gram, const Tile& tile, int64_t m, int64_t a) {
  for (int64_t b = a; b <= m; b += 4) {
    switch (m + 1 - b) {
      case 1: gram_block<A, 1>(gram, tile, m, a, b); break;
      case 2: gram_block<A, 2>(gram, tile, m, a, b); break;
      case 3: gram_block<A, 3>(gram, tile, m, a, b); break;
      default: gram_block<A, 4>(gram, tile, m, a, b); break;
    }
  }
}

// scores <- lambda . x (+ log w); returns the vectors of the largest and of the largest lambda . x with w > 0.
// M = m where the compiler knows it, so that lambda stays in registers; 0 otherwise.
template <int M> static void score_tile(vecd& best, vecd& top, Tile& tile, const double* lambda, int64_t m) {
  double* scores = tile.scores;
  const int64_t width = tile.width;
  const double* x = tile.column(1);
  vecd fixed[M > 0 ? M : 1];
#pragma GCC unroll 8
  for (int j = 0; j < M; ++j) fixed[j] = splat<double>(lambda[j]);
  for (int64_t i = 0; i < tile.padded; i += kLanes) {
    vecd s = {};
    if constexpr (M > 0) {
#pragma GCC unroll 8
      for (int j = 0; j < M; ++j) s += fixed[j] * load<double>(x + j * width + i);
    } else {
      for (int64_t j = 0; j < m; ++j) s += lambda[j] * load<double>(x + j * width + i);
    }
    if (tile.weighted) {
      const vecd w = load<double>(tile.log_weights + i);
      top = max<double>(top, w > -kInf ? s : splat<double>(-kInf));
      s = w > -kInf ? s + w : splat<double>(-kInf);
    }
    store<double>(scores + i, s);
    best = max<double>(best, s);
  }
}

static void add_tile(const Partial& sums, Tile& tile, const double* lambda, int64_t m) {
  double* scores = tile.scores;
  vecd best = splat<double>(-kInf), top = best;
  switch (m) {
    case 1: score_tile<1>(best, top, tile, lambda, m); break;
    case 2: score_tile<2>(best, top, tile, lambda, m); break;
    case 3: score_tile<3>(best, top, tile, lambda, m); break;
    case 4: score_tile<4>(best, top, tile, lambda, m); break;
    case 5: score_tile<5>(best, top, tile, lambda, m); break;
    case 6: score_tile<6>(best, top, tile, lambda, m); break;
    case 7: score_tile<7>(best, top, tile, lambda, m); break;
    case 8: score_tile<8>(best, top, tile, lambda, m); break;
    default: score_tile<0>(best, top, tile, lambda, m); break;
  }
  for (int64_t i = tile.rows; i < tile.padded; ++i) scores[i] = -kInf;
  double tile_best = -kInf, tile_top = -kInf;
  if (tile.rows == tile.padded) {
    tile_best = reduce_max<double>(best);
    tile_top = reduce_max<double>(top);
  } else {  // the padding's scores are in `best`
    for (int64_t i = 0; i < tile.rows; ++i) tile_best = scores[i] > tile_best ? scores[i] : tile_best;
    if (tile.weighted) {
      for (int64_t i = 0; i < tile.rows; ++i) {
        const double s = scores[i] - tile.log_weights[i];
        if (tile.log_weights[i] > -kInf && s > tile_top) tile_top = s;
      }
    }
  }
  if (!tile.weighted) tile_top = tile_best;
  if (tile_top > *sums.top) *sums.top = tile_top;
  if (tile_best > *sums.shift) {
    sums.scale(m, rescale(*sums.shift, tile_best));
    *sums.shift = tile_best;
  }
  const double shift = *sums.shift == -kInf ? 0.0 : *sums.shift;
  vecd squares = load<double>(sums.squares);
  for (int64_t i = 0; i < tile.padded; i += kLanes) {
    const vecd e = exp_nonpositive(load<double>(scores + i) - shift);
    squares += e * e;
    store<double>(scores + i, e);
  }
  store<double>(sums.squares, squares);
  for (int64_t a = 0; a <= m;) {
    const int64_t left = m + 1 - a;
    if (left == 1) {
      gram_rows<1>(sums.gram, tile, m, a);
      a += 1;
    } else if (left == 2 || left == 4) {  // 2 + 2: one row alone would wait for each of its additions
      gram_rows<2>(sums.gram, tile, m, a);
      a += 2;
    } else {
      gram_rows<3>(sums.gram, tile, m, a);
      a += 3;
    }
  }
}

// totals (count,) <- the rows [begin, end) under every lambda
template <typename S>
static void sum_rows(double* totals, double* partials, Tile& tile, const MapInput& in, int64_t begin, int64_t end,
                     const double* lambda, int64_t count) {
  const int64_t m = in.m, size = Partial::size(m);
  for (int64_t k = 0; k < count; ++k) Partial(partials + k * size).clear(m);
  for (int64_t at = begin; at < end; at += tile.width) {
    load_tile<S>(tile, in, at, at_most(at + tile.width, end));
    for (int64_t k = 0; k < count; ++k) add_tile(Partial(partials + k * size), tile, lambda + k * m, m);
  }
  for (int64_t k = 0; k < count; ++k) add_up(Total(totals + k * Total::size(m)), Partial(partials + k * size), m);
}

static void merge(const Total& into, const Total& from, int64_t m) {
  if (*from.top > *into.top) *into.top = *from.top;
  double factor = 1.0;
  if (*from.shift > *into.shift) {
    into.scale(m, rescale(*into.shift, *from.shift));
    *into.shift = *from.shift;
  } else {
    factor = rescale(*from.shift, *into.shift);
  }
  *into.squares += *from.squares * factor * factor;
  for (int64_t i = 0; i < triangle(m); ++i) into.gram[i] += from.gram[i] * factor;
}

// out += the moments that the sums stand for, about `moved` less than their own center (null: nothing less)
static void add_moments(double* out, const Total& sums, int64_t m, const double* moved, const double* lambda) {
  const double total = sums.gram[0];
  double score = 0;
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

// What a thread works in: a tile, and the sums in lanes of every lambda.
struct Workspace {
  double *memory, *partials;
  Tile tile;
  Workspace(const MapInput& in, int64_t count)
      : memory(allocate(Tile::size(in.m) + count * (Partial::size(in.m) + Total::size(in.m)))),
        partials(memory + Tile::size(in.m)), tile(memory, in.m, in.log_weights != nullptr) {}
  ~Workspace() { std::free(memory); }
  double* totals(int64_t m, int64_t count) const { return partials + count * Partial::size(m); }
  static double* allocate(int64_t doubles) { return static_cast<double*>(std::calloc(size_t(doubles), sizeof(double))); }
};

template <typename S>
static void joint(double* out, const MapInput& in, const double* lambda, int64_t count, int threads) {
  const int64_t m = in.m, size = Total::size(m), chunks = (in.n + kChunkRows - 1) / kChunkRows;
  double* totals = Workspace::allocate(chunks * count * size);
#pragma omp parallel num_threads(threads)
  {
    Workspace work(in, count);
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < chunks; ++c) {
      sum_rows<S>(totals + c * count * size, work.partials, work.tile, in, c * kChunkRows,
                  at_most((c + 1) * kChunkRows, in.n), lambda, count);
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    const Total total(totals + k * size);
    for (int64_t c = 1; c < chunks; ++c) merge(total, Total(totals + (c * count + k) * size), m);
    add_moments(out + k * (3 + m + m * m), total, m, nullptr, nullptr);
  }
  std::free(totals);
}

template <typename S>
static void grouped(double* out, const MapInput& in, const double* lambda, int64_t count, int threads) {
  const int64_t m = in.m, moments = 3 + m + m * m;
  const int64_t per_chunk = at_most(in.groups, kChunkRows * in.groups / in.n + 1);
  const int64_t chunks = (in.groups + per_chunk - 1) / per_chunk;
  double* partial = Workspace::allocate(chunks * count * moments);
#pragma omp parallel num_threads(threads)
  {
    Workspace work(in, count);
    double* totals = work.totals(m, count);
    // Each group is summed about its own first row: within a prompt rewards may differ by far less than between
    // prompts, and would lose those digits about a center that is common to all.
    double *first = Workspace::allocate(2 * m), *moved = first + m;
    MapInput own = in;
    own.center = first;
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t g = c * per_chunk; g < at_most((c + 1) * per_chunk, in.groups); ++g) {
        const S* row = row_of<S>(in, in.offsets[g]);
        for (int64_t j = 0; j < m; ++j) {
          first[j] = double(row[j]);
          moved[j] = first[j] - in.center[j];
        }
        sum_rows<S>(totals, work.partials, work.tile, own, in.offsets[g], in.offsets[g + 1], lambda, count);
        for (int64_t k = 0; k < count; ++k) {
          add_moments(partial + (c * count + k) * moments, Total(totals + k * Total::size(m)), m, moved, lambda + k * m);
        }
      }
    }
    std::free(first);
  }
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
  const int64_t chunks = (in.n + kChunkRows - 1) / kChunkRows, most = (int64_t(1) << 22) / ((chunks + kLanes) * moments) + 1;
  // A thread is woken only for a tenth of a millisecond's work or more.
  threads = int(at_most(at_most(threads, chunks), 1 + ((in.n * (in.m + 4) * (in.m + 4) * count) >> 21)));
  const bool wide = in.dtype == DType::float64, by_group = in.offsets != nullptr;
  const auto run = by_group ? (wide ? grouped<double> : grouped<float>) : (wide ? joint<double> : joint<float>);
  for (int64_t k = 0; k < count; k += most) {
    run(out + k * moments, in, lambda + k * in.m, at_most(most, count - k), threads);
  }
}

}  // namespace fastalign::FASTALIGN_LEVEL
