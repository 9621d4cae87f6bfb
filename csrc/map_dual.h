// The dual of K palettes at a point: sums of map_tile.h over all rows, over a few of them, in double or in float, and of
// map_nearby.h where the columns are kept. Included by the per-level files alone (see isa.h).
#pragma once

#include "crew.h"
#include "map_newton.h"
#include "map_series.h"

namespace fastalign::FASTALIGN_LEVEL {

// One run of neighbours in every so many rows, at most so many in all, for a start that costs next to nothing.
constexpr int64_t kRun = 64, kFewShare = 16, kFewRows = 65536, kEnoughRows = 131072;
// Scores may lie so far below their bound before their exp, squared in float, are in danger.
constexpr double kBound = 16, kLowest = 700;
constexpr int64_t kSeriesPieces = 64;

// Whose covariance a point has: its own, that of a point nearby (none was made), or one summed in float.
enum class Model { own, near, rough };
// few, rough: in float, over some rows or all. series: from moments, over none. The others in double: slope makes no
// covariance, exact makes it; in between it is made in float where that costs little, and where it does not, exactly
// (curved) or not at all (cheap).
enum class How { few, series, rough, slope, cheap, curved, exact };

struct Point {
  double value, top, ess;
  double *mu, *gradient, *hessian;
  Model model;
  bool fresh;  // its covariance was made where it is
};

static double dot(const double* a, const double* b, int64_t m) {
  double sum = 0;
  for (int64_t j = 0; j < m; ++j) sum += a[j] * b[j];
  return sum;
}
static double norm(const double* a, int64_t m) { return __builtin_sqrt(dot(a, a, m)); }
static bool finite(double x) { return x - x == 0; }
static void copy(double* to, const double* from, int64_t count) { std::memcpy(to, from, size_t(count) * sizeof(double)); }

// What is known of the last pass over kept columns in double.
struct Base {
  float* weights = nullptr;  // (rows,) e, about the shift of its tile
  double *shifts = nullptr, *lambda = nullptr, *delta = nullptr, *sums = nullptr;
  float* narrow_delta = nullptr;
  double top = 0;  // largest score, at lambda
  // Whether lambda and top are known, and whether weights, shifts and sums are.
  bool topped = false, weighed = false;
  double* memory = nullptr;

  Base(int64_t m, int64_t rows) {
    const int64_t width = Tile<double>::width_for(m), tiles = (rows + width - 1) / width, pad = (m + 15) / 16 * 16;
    if (rows == 0) return;
    weights = allocate_zeros<float>(tiles * width);
    memory = allocate_zeros<double>(Total::size(m) + 3 * pad + tiles);
    sums = memory, lambda = sums + Total::size(m), delta = lambda + pad, shifts = delta + 2 * pad;
    narrow_delta = reinterpret_cast<float*>(delta + pad);
  }
  Base(const Base&) = delete;
  ~Base() {
    std::free(weights);
    std::free(memory);
  }
};

// What one thread works in.
struct Desk {
  int64_t m;
  double* memory;
  float* narrow_memory;
  double *scores, *partial, *sums, *all, *lambda, *goal, *step, *factor, *solved, *slope;
  float *narrow_scores, *narrow_partial, *narrow_lambda;
  double* tile;
  float* narrow_tile;
  int64_t* free;
  double* points[3];
  double* factors = nullptr;  // of the series
  Base base;

  Desk(int64_t m, int64_t kept_rows) : m(m), base(m, kept_rows) {
    const int64_t width = Tile<double>::width_for(m), narrow_width = Tile<float>::width_for(m), pad = (m + 15) / 16 * 16, square = (m * m + 15) / 16 * 16;
    const int64_t point = 2 * pad + square;
    memory = allocate_zeros<double>(width + Partial<double>::size(m) + 2 * Total::size(m) + 5 * pad + square +
                                    Tile<double>::size(m) + pad + 3 * point);
    double* at = memory;
    const auto take = [&](int64_t count) { double* given = at; at += count; return given; };
    scores = take(width), partial = take(Partial<double>::size(m));
    sums = take(Total::size(m)), all = take(Total::size(m));
    lambda = take(pad), goal = take(pad), step = take(pad), solved = take(pad), slope = take(pad);
    factor = take(square), tile = take(Tile<double>::size(m));
    free = reinterpret_cast<int64_t*>(take(pad));
    for (double*& p : points) p = take(point);
    narrow_memory = allocate_zeros<float>(narrow_width + Partial<float>::size(m) + pad + Tile<float>::size(m));
    narrow_scores = narrow_memory, narrow_partial = narrow_scores + narrow_width;
    narrow_lambda = narrow_partial + Partial<float>::size(m), narrow_tile = narrow_lambda + pad;
  }
  Desk(const Desk&) = delete;
  ~Desk() {
    std::free(memory);
    std::free(narrow_memory);
    std::free(factors);
  }
  Point point(int i) const {
    const int64_t pad = (m + 15) / 16 * 16;
    return {0, 0, 0, points[i], points[i] + pad, points[i] + 2 * pad, Model::own, false};
  }
};

// All rows as columns, for both kinds of pass, where they are few enough to be kept.
struct Columns {
  bool kept = false;
  double* wide = nullptr;
  float* narrow = nullptr;
  double* reach = nullptr;  // (m,) the largest |x| of each column
  template <typename C> C* of(int64_t tile, int64_t m) const {
    if constexpr (sizeof(C) == 8) return wide + tile * Tile<double>::size(m);
    else return narrow + tile * Tile<float>::size(m);
  }
};

struct Dual {
  const MapProblem& problem;
  const MapInput& in;
  Crew& crew;
  Columns columns;
  Desk** desks;
  double *chunk_sums = nullptr, few_norm = 0;
  int64_t m, chunks, few_stride;
  Series series = {};

  // total <- the tiles of one chunk
  template <typename C> void sum_chunk(const Total& total, Desk& desk, int64_t c, const double* lambda, How how) {
    const bool second = how != How::slope;
    C *scores, *memory, *own_tile, *narrow = nullptr;
    if constexpr (sizeof(C) == 8) scores = desk.scores, memory = desk.partial, own_tile = desk.tile, narrow = desk.lambda;
    else scores = desk.narrow_scores, memory = desk.narrow_partial, own_tile = desk.narrow_tile, narrow = desk.narrow_lambda;
    if constexpr (sizeof(C) == 4) {
      for (int64_t j = 0; j < m; ++j) narrow[j] = C(lambda[j]);
    }
    const bool weighted = in.log_weights != nullptr;
    const C* at_lambda = sizeof(C) == 8 ? reinterpret_cast<const C*>(lambda) : narrow;
    const Partial<C> partial(memory, m);
    partial.clear(m);
    const int64_t begin = c * kChunkRows, end = at_most(begin + kChunkRows, in.n), width = Tile<C>::width_for(m);
    if (how == How::few) {
      Tile<C> tile(own_tile, m, weighted);
      for (int64_t at = (begin + few_stride - 1) / few_stride * few_stride; at < end; at += few_stride) {
        load(tile, at, at_most(at + kRun, end));
        add_tile<C>(partial, tile, scores, at_lambda, m, second);
      }
    } else if (columns.kept) {
      for (int64_t at = begin; at < end; at += width) {
        const Tile<C> tile(columns.of<C>(at / width, m), m, weighted, at_most(width, end - at));
        add_tile<C>(partial, tile, scores, at_lambda, m, second);
        if constexpr (sizeof(C) == 8) {
          for (int64_t i = 0; i < tile.padded; i += lanes<double>) {
            store_narrow(desk.base.weights + at + i, FASTALIGN_LEVEL::load<double>(scores + i));
          }
          desk.base.shifts[at / width] = *partial.shift;
        }
      }
    } else {
      Tile<C> tile(own_tile, m, weighted);
      for (int64_t at = begin; at < end; at += width) {
        load(tile, at, at_most(at + width, end));
        add_tile<C>(partial, tile, scores, at_lambda, m, second);
      }
    }
    add_up<C>(total, partial, m);
  }
  template <typename C> void load(Tile<C>& tile, int64_t begin, int64_t end) {
    if (in.dtype == DType::float64) load_tile<C, double>(tile, in, begin, end);
    else load_tile<C, float>(tile, in, begin, end);
  }

  template <typename C> C* keep_columns() {
    const int64_t width = Tile<C>::width_for(m), tiles = (in.n + width - 1) / width;
    C* memory = static_cast<C*>(std::aligned_alloc(64, size_t(tiles * Tile<C>::size(m)) * sizeof(C)));
    for (int64_t t = 0; t < tiles; ++t) {
      Tile<C> tile(memory + t * Tile<C>::size(m), m, in.log_weights != nullptr);
      load(tile, t * width, at_most((t + 1) * width, in.n));
    }
    return memory;
  }

  double* largest_values() const {
    const int64_t width = Tile<double>::width_for(m);
    double* reach = allocate_zeros<double>(m);
    for (int64_t at = 0; at < in.n; at += width) {
      const Tile<double> tile(columns.of<double>(at / width, m), m, false, at_most(width, in.n - at));
      for (int64_t j = 0; j < m; ++j) {
        vec<double> most = splat<double>(reach[j]);
        for (int64_t i = 0; i < tile.padded; i += lanes<double>) {
          const vec<double> x = FASTALIGN_LEVEL::load<double>(tile.column(j + 1) + i);
          most = max<double>(most, max<double>(x, -x));
        }
        reach[j] = largest<double>(most);
      }
    }
    return reach;
  }

  // By how much the score of any row may have moved since the base; base.delta <- by what lambda did.
  double moved(Base& base, const double* lambda) const {
    double most = 0;
    for (int64_t j = 0; j < m; ++j) {
      base.delta[j] = lambda[j] - base.lambda[j];
      most += __builtin_fabs(base.delta[j]) * columns.reach[j];
    }
    return most;
  }

  // No score is farther from 0.
  double farthest(const double* lambda) const {
    double most = 0;
    for (int64_t j = 0; j < m; ++j) most += __builtin_fabs(lambda[j]) * columns.reach[j];
    return most;
  }

  // f(rows, weights, narrow columns, their width, e^(shift of the weights - that of all)) for every tile of the base
  template <typename F> void each_based_tile(const Base& base, const F& f) const {
    const int64_t width = Tile<double>::width_for(m), narrow_width = Tile<float>::width_for(m);
    const double shift = *Total(base.sums, m).shift;
    for (int64_t at = 0; at < in.n; at += width) {
      const float* x = columns.of<float>(at / narrow_width, m) + narrow_width + at % narrow_width;
      f(at_most(width, in.n - at), base.weights + at, x, narrow_width, rescale(base.shifts[at / width], shift));
    }
  }

  void sum_nearby(const Total& total, Desk& desk, double apart, bool second) const {
    Base& base = desk.base;
    const Partial<double> partial(desk.partial, m);
    partial.clear(m);
    for (int64_t j = 0; j < m; ++j) base.narrow_delta[j] = float(base.delta[j]);
    with_width<kMostNearby>(m, [&](auto width) {
      each_based_tile(base, [&](int64_t rows, const float* weights, const float* x, int64_t stride, double factor) {
        add_nearby<width>(partial, x, stride, rows, weights, base.narrow_delta, factor, second);
      });
    });
    add_up<double>(total, partial, m);
    const Total before(base.sums, m);
    *total.squares += *before.squares;
    for (int64_t j = 0; j <= m; ++j) total.gram[j] += before.gram[j];
    *total.shift = *before.shift;
    *total.top = base.top + apart;  // at most
  }

  void sum_below(const Total& total, Desk& desk, const double* lambda, double bound) const {
    const Partial<double> partial(desk.partial, m);
    partial.clear(m);
    *partial.shift = bound;
    const int64_t tile_width = Tile<double>::width_for(m);
    with_width<kMostNearby>(m, [&](auto width) {
      for (int64_t at = 0; at < in.n; at += tile_width) {
        const Tile<double> tile(columns.of<double>(at / tile_width, m), m, false, at_most(tile_width, in.n - at));
        add_tile_below<width>(partial, tile, desk.base.weights + at, lambda);
        desk.base.shifts[at / tile_width] = bound;
      }
    });
    add_up<double>(total, partial, m);
  }

  // The series about mu, of at most this degree in all.
  void expand(const double* mu, int degree) {
    series.m = m, series.degree = degree;
    const int64_t size = Series::size(m, degree), width = Tile<double>::width_for(m), tiles = (in.n + width - 1) / width;
    const int64_t pieces = at_most(tiles, kSeriesPieces);
    series.coefficients = allocate_zeros<double>(size + 2 * m);
    series.center = series.coefficients + size, series.mean = series.center + m;
    Desk& own = *desks[0];
    for (int64_t j = 0; j < m; ++j) own.lambda[j] = mu[j] / problem.scale[j];
    const Total total(own.all, m);
    sum_kept(total, own, own.lambda, How::exact);
    const double top = series.top = own.base.top;
    for (int64_t j = 0; j < m; ++j) {
      series.center[j] = mu[j];
      series.mean[j] = total.gram[j + 1] / total.gram[0] / problem.scale[j];
    }
    double* parts = allocate_zeros<double>(pieces * size);
    crew.each(pieces, [&](int thread, int64_t p) {
      double* memory = allocate_zeros<double>(kSeriesRows + Series::memory_for_rows(m, degree));
      for (int64_t t = p * tiles / pieces; t < (p + 1) * tiles / pieces; ++t) {
        const Tile<double> tile(columns.of<double>(t, m), m, in.log_weights != nullptr, at_most(width, in.n - t * width));
        vec<double> ignored = {};
        score_tile<double, 0>(ignored, ignored, tile, desks[thread]->scores, own.lambda, m);
        for (int64_t at = 0; at < tile.rows; at += kSeriesRows) {
          const int64_t rows = at_most(kSeriesRows, tile.rows - at);
          for (int64_t i = 0; i < kSeriesRows; i += lanes<double>) {
            vec<double> e = {};
            if (i < rows) e = exp_nonpositive(FASTALIGN_LEVEL::load<double>(desks[thread]->scores + at + i) - top);
            for (int l = 0; l < lanes<double>; ++l) e[l] = i + l < rows ? e[l] : 0.0;
            store<double>(memory + i, e);
          }
          series.add(parts + p * size, tile.column(1) + at, width, rows, memory, problem.scale, memory + kSeriesRows);
        }
      }
      std::free(memory);
    });
    for (int64_t p = 0; p < pieces; ++p) {
      for (int64_t i = 0; i < size; ++i) series.coefficients[i] += parts[p * size + i];
    }
    std::free(parts);
    for (int t = 0; t < crew.threads(); ++t) desks[t]->factors = allocate_zeros<double>(3 * m * series.room());
  }

  // total <- the sums of a pass; returns which covariance is among them. Columns that are kept are read by this thread
  // alone, others by all.
  Model sum_all(const Total& total, Desk& desk, const double* lambda, How how) {
    if (columns.kept) return sum_kept(total, desk, lambda, how);
    if (how == How::curved) how = How::exact;
    if (how == How::cheap) how = How::slope;
    const int64_t size = Total::size(m);
    crew.each(chunks, [&](int thread, int64_t c) { sum_one(Total(chunk_sums + c * size, m), *desks[thread], c, lambda, how); });
    bool first = true;
    for (int64_t c = 0; c < chunks; ++c) {
      const Total one(chunk_sums + c * size, m);
      if (one.gram[0] == 0 && how == How::few) continue;  // a chunk that no run of rows begins in
      if (first) copy(total.squares, one.squares, size);
      else merge(total, one, m);
      first = false;
    }
    return made_by(how);
  }
  static Model made_by(How how) {
    return how == How::slope ? Model::near : how == How::exact ? Model::own : Model::rough;
  }
  void sum_one(const Total& total, Desk& desk, int64_t c, const double* lambda, How how) {
    if (how == How::few || how == How::rough) sum_chunk<float>(total, desk, c, lambda, how);
    else sum_chunk<double>(total, desk, c, lambda, how);
  }
  Model sum_kept(const Total& total, Desk& desk, const double* lambda, How how) {
    Base& base = desk.base;
    const bool wide = how != How::rough;
    bool below = false;
    if (wide && how != How::exact && m <= kMostNearby && base.topped) {
      const double apart = moved(base, lambda);
      if (base.weighed && apart <= kNearby) {
        const bool second = how != How::slope;
        sum_nearby(total, desk, apart, second);
        return second ? Model::rough : Model::near;
      }
      below = how != How::curved && apart <= kBound && in.log_weights == nullptr && base.top + apart + farthest(lambda) < kLowest;
      if (below) sum_below(total, desk, lambda, base.top + apart);
    }
    if (how == How::curved) how = How::exact;
    if (how == How::cheap) how = How::slope;
    if (!below) {
      sum_one(total, desk, 0, lambda, how);
      const Total more(desk.sums, m);
      for (int64_t c = 1; c < chunks; ++c) {
        sum_one(more, desk, c, lambda, how);
        merge(total, more, m);
      }
    }
    if (wide) {
      copy(base.lambda, lambda, m), copy(base.sums, total.squares, Total::size(m));
      base.top = *total.top;
      base.topped = base.weighed = true;
    }
    return made_by(how);
  }

  // The dual of palette k at point.mu. A covariance that is not made is left as it was.
  void evaluate(Point& point, Desk& desk, int64_t k, How how) {
    const double *scale = problem.scale, *offset = problem.offset + k * m;
    double shift = 0;
    for (int64_t j = 0; j < m; ++j) {
      desk.lambda[j] = point.mu[j] / scale[j];
      shift += desk.lambda[j] * offset[j];
    }
    const Total total(desk.all, m);
    if (how == How::series) series.sum(total, point.mu, scale, desk.factors);
    const Model made = how == How::series ? Model::rough : sum_all(total, desk, desk.lambda, how);
    point.fresh = made != Model::near;
    const double mass = total.gram[0], base = *total.shift == -kInf ? 0.0 : *total.shift;
    point.value = base + __builtin_log(mass) - (how == How::few ? few_norm : problem.log_norm) + shift;
    point.top = *total.top + shift;
    point.ess = mass * mass / *total.squares;
    const double* second = total.gram + m + 1;
    for (int64_t j = 0; j < m; ++j) {
      const double mean = total.gram[j + 1] / mass;
      point.gradient[j] = problem.constant[j] ? 0.0 : (mean + offset[j]) / scale[j];
      if (!point.fresh) continue;
      for (int64_t i = j; i < m; ++i) {
        double c = (*second++ / mass - mean * (total.gram[i + 1] / mass)) / (scale[j] * scale[i]);
        if (i == j) c += kRounding * (c + mean / scale[j] * (mean / scale[j]));
        point.hessian[j * m + i] = point.hessian[i * m + j] = c;
      }
    }
    if (point.fresh) point.model = made;
    else if (point.model == Model::own) point.model = Model::near;
  }
};

}  // namespace fastalign::FASTALIGN_LEVEL
