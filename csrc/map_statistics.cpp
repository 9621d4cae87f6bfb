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
constexpr int64_t kChunkRows = 8192;

// Sums of one lambda over some rows: the shift, the largest score, sum e^2, and the upper triangle (m+1)(m+1)/2 of
// sum e (1, x)(1, x)^T row by row, e = w exp(s - shift).
struct Sums {
  double *shift, *top, *squares, *gram;
  static int64_t size(int64_t m) { return 3 + (m + 1) * (m + 2) / 2; }
  explicit Sums(double* at) : shift(at), top(at + 1), squares(at + 2), gram(at + 3) {}
  void clear(int64_t m) const {
    *shift = *top = -kInf;
    *squares = 0;
    for (int64_t i = 0; i < (m + 1) * (m + 2) / 2; ++i) gram[i] = 0;
  }
  void scale(int64_t m, double factor) const {
    *squares *= factor * factor;
    for (int64_t i = 0; i < (m + 1) * (m + 2) / 2; ++i) gram[i] *= factor;
  }
};

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

template <typename S> static void load_tile(Tile& tile, const MapInput& in, int64_t begin, int64_t end) {
  const S* rewards = static_cast<const S*>(in.rewards);
  tile.rows = end - begin;
  tile.padded = (tile.rows + kLanes - 1) / kLanes * kLanes;
  const int64_t width = tile.width, m = in.m;
  double* columns = tile.columns + width;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const S* row = rewards + (in.order != nullptr ? in.order[begin + i] : begin + i) * in.row_stride;
    for (int64_t j = 0; j < m; ++j) columns[j * width + i] = double(row[j]) - in.center[j];
  }
  for (int64_t i = tile.rows; i < tile.padded; ++i) {
    for (int64_t j = 0; j < m; ++j) columns[j * width + i] = 0;
  }
  if (tile.weighted) {
    for (int64_t i = 0; i < tile.rows; ++i) {
      tile.log_weights[i] = in.log_weights[in.order != nullptr ? in.order[begin + i] : begin + i];
    }
    for (int64_t i = tile.rows; i < tile.padded; ++i) tile.log_weights[i] = -kInf;
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
      if (b + k >= row) gram[start + b + k] += reduce_add<double>(sums[j][k]);
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

static void add_tile(const Sums& sums, Tile& tile, const double* lambda, int64_t m) {
  double* scores = tile.scores;
  vecd best = splat<double>(-kInf), top = best;
  for (int64_t i = 0; i < tile.padded; i += kLanes) {
    vecd s = splat<double>(lambda[0]) * load<double>(tile.column(1) + i);
    for (int64_t j = 1; j < m; ++j) s += lambda[j] * load<double>(tile.column(j + 1) + i);
    if (tile.weighted) {
      const vecd w = load<double>(tile.log_weights + i);
      top = max<double>(top, w > -kInf ? s : splat<double>(-kInf));
      // A row of no weight counts as absent even where its score is infinite; a NaN stays.
      s = w > -kInf ? s + w : (s == s ? w : s);
    }
    store<double>(scores + i, s);
    best = max<double>(best, s);
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
  vecd squares = {};
  for (int64_t i = 0; i < tile.padded; i += kLanes) {
    const vecd e = exp(load<double>(scores + i) - shift);
    squares += e * e;
    store<double>(scores + i, e);
  }
  *sums.squares += reduce_add<double>(squares);
  for (int64_t a = 0; a <= m; a += 3) {
    switch (m + 1 - a) {
      case 1: gram_rows<1>(sums.gram, tile, m, a); break;
      case 2: gram_rows<2>(sums.gram, tile, m, a); break;
      default: gram_rows<3>(sums.gram, tile, m, a); break;
    }
  }
}

template <typename S>
static void add_rows(double* sums, Tile& tile, const MapInput& in, int64_t begin, int64_t end, const double* lambda,
                     int64_t count) {
  for (int64_t at = begin; at < end; at += tile.width) {
    load_tile<S>(tile, in, at, at + tile.width < end ? at + tile.width : end);
    for (int64_t k = 0; k < count; ++k) add_tile(Sums(sums + k * Sums::size(in.m)), tile, lambda + k * in.m, in.m);
  }
}

static void merge(const Sums& into, const Sums& from, int64_t m) {
  if (*from.top > *into.top) *into.top = *from.top;
  double factor = 1.0;
  if (*from.shift > *into.shift) {
    into.scale(m, rescale(*into.shift, *from.shift));
    *into.shift = *from.shift;
  } else {
    factor = rescale(*from.shift, *into.shift);
  }
  *into.squares += *from.squares * factor * factor;
  for (int64_t i = 0; i < (m + 1) * (m + 2) / 2; ++i) into.gram[i] += from.gram[i] * factor;
}

// out += the moments that the sums stand for
static void add_moments(double* out, const Sums& sums, int64_t m) {
  const double total = sums.gram[0];
  out[0] += (*sums.shift == -kInf ? 0.0 : *sums.shift) + __builtin_log(total);
  out[1] += total * total / *sums.squares;
  out[2] += *sums.top;
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

static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename S>
static void joint(double* out, const MapInput& in, const double* lambda, int64_t count, int threads) {
  const int64_t m = in.m, size = Sums::size(m), chunks = (in.n + kChunkRows - 1) / kChunkRows;
  double* partial = static_cast<double*>(std::malloc(size_t(chunks * count * size) * sizeof(double)));
#pragma omp parallel num_threads(threads)
  {
    double* memory = static_cast<double*>(std::malloc(size_t(Tile::size(m)) * sizeof(double)));
    Tile tile(memory, m, in.log_weights != nullptr);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks; ++c) {
      double* sums = partial + c * count * size;
      for (int64_t k = 0; k < count; ++k) Sums(sums + k * size).clear(m);
      add_rows<S>(sums, tile, in, c * kChunkRows, at_most((c + 1) * kChunkRows, in.n), lambda, count);
    }
    std::free(memory);
  }
  for (int64_t k = 0; k < count; ++k) {
    const Sums sums(partial + k * size);
    for (int64_t c = 1; c < chunks; ++c) merge(sums, Sums(partial + (c * count + k) * size), m);
    add_moments(out + k * (3 + m + m * m), sums, m);
  }
  std::free(partial);
}

template <typename S>
static void grouped(double* out, const MapInput& in, const double* lambda, int64_t count, int threads) {
  const int64_t m = in.m, size = Sums::size(m), moments = 3 + m + m * m;
  const int64_t per_chunk = at_most(in.groups, kChunkRows * in.groups / in.n + 1);
  const int64_t chunks = (in.groups + per_chunk - 1) / per_chunk;
  double* partial = static_cast<double*>(std::calloc(size_t(chunks * count * moments), sizeof(double)));
#pragma omp parallel num_threads(threads)
  {
    double* memory = static_cast<double*>(std::malloc(size_t(Tile::size(m) + count * size) * sizeof(double)));
    Tile tile(memory, m, in.log_weights != nullptr);
    double* sums = memory + Tile::size(m);
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t g = c * per_chunk; g < at_most((c + 1) * per_chunk, in.groups); ++g) {
        for (int64_t k = 0; k < count; ++k) Sums(sums + k * size).clear(m);
        add_rows<S>(sums, tile, in, in.offsets[g], in.offsets[g + 1], lambda, count);
        for (int64_t k = 0; k < count; ++k) add_moments(partial + (c * count + k) * moments, Sums(sums + k * size), m);
      }
    }
    std::free(memory);
  }
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t i = 0; i < count * moments; ++i) out[i] += partial[c * count * moments + i];
  }
  for (int64_t i = 0; i < count * moments; ++i) out[i] /= double(in.groups);
  std::free(partial);
}

void map_statistics(double* out, const MapInput& in, const double* lambda, int64_t count, int threads) {
  for (int64_t i = 0; i < count * (3 + in.m + in.m * in.m); ++i) out[i] = 0;
  const bool wide = in.dtype == DType::float64;
  if (in.offsets != nullptr) {
    wide ? grouped<double>(out, in, lambda, count, threads) : grouped<float>(out, in, lambda, count, threads);
  } else {
    wide ? joint<double>(out, in, lambda, count, threads) : joint<float>(out, in, lambda, count, threads);
  }
}

}  // namespace fastalign::FASTALIGN_LEVEL
