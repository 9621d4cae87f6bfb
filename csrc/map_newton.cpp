// map_newton: projected Newton with an exact active set and a safeguarded line search (fastalign/palette/_newton.py, which
// the tests hold it to), on sums of map_tile.h. A start is first sought in float, whose passes take a third of the time;
// what is returned was evaluated in double. A pass that only confirms makes no covariance: a step may use that of a point
// nearby, and takes its own as soon as the residual does not fall a hundredfold. Built once per level.
#include "map_newton.h"

#include "crew.h"
#include "map_tile.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr int kMaxPasses = 200, kLineSearch = 40, kPolishSteps = 3;
constexpr double kHuge = 1e12, kRounding = 16 * 0x1p-52;
// A rough search ends at a residual from which one step more leaves about its square; from where that and the
// Hessian's own distance cost less than a pass, its Hessian serves on.
constexpr double kRoughEnough = 3e-3, kRoughModel = 4e-4, kContraction = 1e-2, kWellConditioned = 1e-3;
// One run of neighbours in every so many rows, at most so many in all, for a start that costs next to nothing.
constexpr int64_t kRun = 64, kFewShare = 16, kFewRows = 65536, kEnoughRows = 131072;
constexpr int64_t kNearest = 1024;

// Whose covariance a point has: its own, that of a point nearby, or one summed in float.
enum class Model { own, near, rough };
enum class How { few, rough, nearby, slope, exact };

struct Point {
  double value, top, ess;
  double *mu, *gradient, *hessian;
  Model model;
};

static double dot(const double* a, const double* b, int64_t m) {
  double sum = 0;
  for (int64_t j = 0; j < m; ++j) sum += a[j] * b[j];
  return sum;
}
static double norm(const double* a, int64_t m) { return __builtin_sqrt(dot(a, a, m)); }
static double clip(double x, double low, double high) { return x < low ? low : x > high ? high : x; }
static bool finite(double x) { return x - x == 0; }

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
  // The weights of the last pass over kept columns in double, with the shift of each tile, its lambda and largest score.
  double *weights = nullptr, *shifts = nullptr, *base = nullptr, *delta = nullptr, base_top = 0;
  bool based = false;

  Desk(int64_t m, int64_t kept_rows) : m(m) {
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
    if (kept_rows > 0) {
      const int64_t tiles = (kept_rows + width - 1) / width;
      weights = static_cast<double*>(std::aligned_alloc(64, size_t(tiles * width) * sizeof(double)));
      shifts = allocate_zeros<double>(tiles + 2 * pad);
      base = shifts + tiles, delta = base + pad;
    }
    narrow_lambda = narrow_partial + Partial<float>::size(m), narrow_tile = narrow_lambda + pad;
  }
  Desk(const Desk&) = delete;
  ~Desk() {
    std::free(memory);
    std::free(narrow_memory);
    std::free(weights);
    std::free(shifts);
  }
  Point point(int i) const {
    const int64_t pad = (m + 15) / 16 * 16;
    return {0, 0, 0, points[i], points[i] + pad, points[i] + 2 * pad, Model::own};
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

struct Solver {
  const MapProblem& problem;
  const MapInput& in;
  Crew& crew;
  Columns columns;
  Desk** desks;
  double *chunk_sums = nullptr, few_norm = 0;
  int64_t m, chunks, few_stride;

  // total <- the tiles of one chunk
  template <typename C> void sum_chunk(const Total& total, Desk& desk, int64_t c, const double* lambda, How how) {
    const bool second = how != How::slope && how != How::nearby;
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
        if constexpr (sizeof(C) == 8) {
          double *weights = desk.weights + at, *shift = desk.shifts + at / width;
          if (how == How::nearby) {
            add_nearby(partial, tile, weights, *shift, desk.delta);
          } else {
            add_tile<C>(partial, tile, weights, at_lambda, m, second);
            *shift = *partial.shift;
          }
        } else {
          add_tile<C>(partial, tile, scores, at_lambda, m, second);
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
  void add_nearby(const Partial<double>& sums, const Tile<double>& tile, const double* weights, double shift,
                  const double* delta) const {
    switch (m) {
      case 1: return add_tile_nearby<1>(sums, tile, weights, shift, delta);
      case 2: return add_tile_nearby<2>(sums, tile, weights, shift, delta);
      case 3: return add_tile_nearby<3>(sums, tile, weights, shift, delta);
      case 4: return add_tile_nearby<4>(sums, tile, weights, shift, delta);
      case 5: return add_tile_nearby<5>(sums, tile, weights, shift, delta);
      case 6: return add_tile_nearby<6>(sums, tile, weights, shift, delta);
      case 7: return add_tile_nearby<7>(sums, tile, weights, shift, delta);
      default: return add_tile_nearby<8>(sums, tile, weights, shift, delta);
    }
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

  // By how much the score of any row may have moved since the desk's weights were made; desk.delta <- by what lambda did.
  double moved(Desk& desk, const double* lambda) const {
    double most = 0;
    for (int64_t j = 0; j < m; ++j) {
      desk.delta[j] = lambda[j] - desk.base[j];
      most += __builtin_fabs(desk.delta[j]) * columns.reach[j];
    }
    return most;
  }

  // total <- the sums of a pass. Columns that are kept are read by this thread alone, others by all.
  void sum_all(const Total& total, Desk& desk, const double* lambda, How how) {
    const auto sum = [&](const Total& into, Desk& own, int64_t c) {
      if (how == How::few || how == How::rough) sum_chunk<float>(into, own, c, lambda, how);
      else sum_chunk<double>(into, own, c, lambda, how);
    };
    if (columns.kept) {
      const bool wide = how == How::slope || how == How::exact;
      const double apart = wide && desk.based && m <= 8 ? moved(desk, lambda) : 1;
      if (how == How::slope && apart <= kNearby) how = How::nearby;
      sum(total, desk, 0);
      const Total more(desk.sums, m);
      for (int64_t c = 1; c < chunks; ++c) {
        sum(more, desk, c);
        merge(total, more, m);
      }
      if (how == How::nearby) {
        *total.top = desk.base_top + apart;  // at most
      } else if (wide) {
        copy(desk.base, lambda, m);
        desk.base_top = *total.top;
        desk.based = true;
      }
      return;
    }
    const int64_t size = Total::size(m);
    crew.each(chunks, [&](int thread, int64_t c) { sum(Total(chunk_sums + c * size, m), *desks[thread], c); });
    bool first = true;
    for (int64_t c = 0; c < chunks; ++c) {
      const Total one(chunk_sums + c * size, m);
      if (one.gram[0] == 0 && how == How::few) continue;  // a chunk that no run of rows begins in
      if (first) copy(total.squares, one.squares, size);
      else merge(total, one, m);
      first = false;
    }
  }
  static void copy(double* to, const double* from, int64_t count) { std::memcpy(to, from, size_t(count) * sizeof(double)); }

  // The dual of palette k at point.mu; with How::slope the Hessian is left as it is.
  void evaluate(Point& point, Desk& desk, int64_t k, How how) {
    const double *scale = problem.scale, *offset = problem.offset + k * m;
    double shift = 0;
    for (int64_t j = 0; j < m; ++j) {
      desk.lambda[j] = point.mu[j] / scale[j];
      shift += desk.lambda[j] * offset[j];
    }
    const Total total(desk.all, m);
    sum_all(total, desk, desk.lambda, how);
    const double mass = total.gram[0], base = *total.shift == -kInf ? 0.0 : *total.shift;
    point.value = base + __builtin_log(mass) - (how == How::few ? few_norm : problem.log_norm) + shift;
    point.top = *total.top + shift;
    point.ess = mass * mass / *total.squares;
    const double* second = total.gram + m + 1;
    for (int64_t j = 0; j < m; ++j) {
      const double mean = total.gram[j + 1] / mass;
      point.gradient[j] = problem.constant[j] ? 0.0 : (mean + offset[j]) / scale[j];
      if (how == How::slope) continue;
      for (int64_t i = j; i < m; ++i) {
        double c = (*second++ / mass - mean * (total.gram[i + 1] / mass)) / (scale[j] * scale[i]);
        if (i == j) c += kRounding * (c + mean / scale[j] * (mean / scale[j]));
        point.hessian[j * m + i] = point.hessian[i * m + j] = c;
      }
    }
    point.model = how == How::exact ? Model::own : how == How::slope ? (point.model == Model::own ? Model::near : point.model) : Model::rough;
  }

  void assign(Point& to, const Point& from) const {
    to.value = from.value, to.top = from.top, to.ess = from.ess, to.model = from.model;
    copy(to.mu, from.mu, m), copy(to.gradient, from.gradient, m), copy(to.hessian, from.hessian, m * m);
  }

  double residual(const Point& p) const {
    double most = 0;
    for (int64_t j = 0; j < m; ++j) {
      const double off = __builtin_fabs(p.mu[j] - clip(p.mu[j] - p.gradient[j], problem.lower[j], problem.upper[j]));
      if (!(off <= most)) most = off;
    }
    return most;
  }

  // x <- -A^-1 b over the free variables (LDL^T); returns the least pivot as a share of its diagonal.
  double solve_free(double* x, const double* h, const double* b, Desk& desk, int64_t count) const {
    double *l = desk.factor, worst = 1;
    const int64_t* free = desk.free;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        double s = h[free[i] * m + free[j]];
        for (int64_t k = 0; k < j; ++k) s -= l[i * m + k] * l[j * m + k] * l[k * m + k];
        if (i > j) {
          l[i * m + j] = s / l[j * m + j];
          continue;
        }
        const double diagonal = h[free[i] * m + free[i]], least = 0x1p-52 * diagonal + 1e-290;
        if (!(s > least)) s = least;
        if (s < worst * diagonal) worst = s / diagonal;
        l[i * m + i] = s;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      double s = -b[free[i]];
      for (int64_t k = 0; k < i; ++k) s -= l[i * m + k] * x[k];
      x[i] = s;
    }
    for (int64_t i = 0; i < count; ++i) x[i] /= l[i * m + i];
    for (int64_t i = count - 1; i >= 0; --i) {
      for (int64_t k = i + 1; k < count; ++k) x[i] -= l[k * m + i] * x[k];
    }
    return worst;
  }

  // z <- argmin within the bounds of 1/2 (z-x)' H (z-x) + gradient.(z-x) from x, by a primal active set; see _newton.py.
  double model_minimum(double* z, const Point& point, const double* gradient, Desk& desk) const {
    const double *x = point.mu, *lower = problem.lower, *upper = problem.upper;
    double *h = point.hessian, *g = desk.slope, largest = 0, worst = 1;
    for (int64_t j = 0; j < m; ++j) largest = h[j * m + j] > largest ? h[j * m + j] : largest;
    for (int64_t j = 0; j < m; ++j) {
      if (!(h[j * m + j] >= 1e-14 * largest + 1e-280)) h[j * m + j] = 1e-14 * largest + 1e-280;
    }
    bool held[kMostValues];
    for (int64_t j = 0; j < m; ++j) {
      z[j] = x[j], g[j] = gradient[j];
      held[j] = !((x[j] > lower[j] || g[j] < 0) && (x[j] < upper[j] || g[j] > 0) && lower[j] < upper[j]);
    }
    for (int64_t round = 0; round < 10 * m + 20; ++round) {
      int64_t count = 0;
      for (int64_t j = 0; j < m; ++j) {
        if (!held[j]) desk.free[count++] = j;
      }
      if (count > 0) {
        const double pivot = solve_free(desk.solved, h, g, desk, count);
        worst = pivot < worst ? pivot : worst;
        double t = kInf;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t j = desk.free[i];
          const double goal = z[j] + desk.solved[i];
          if (goal < lower[j] || goal > upper[j]) {
            const double room = ((goal < lower[j] ? lower[j] : upper[j]) - z[j]) / desk.solved[i];
            t = room < t ? room : t;
          }
        }
        for (int64_t i = 0; i < count; ++i) {
          const int64_t j = desk.free[i];
          const double goal = z[j] + desk.solved[i];
          const bool out = goal < lower[j] || goal > upper[j];
          const double end = goal < lower[j] ? lower[j] : upper[j];
          if (out && (end - z[j]) / desk.solved[i] <= t) {
            z[j] = end;
            held[j] = true;
          } else {
            z[j] += (t < kInf ? t : 1.0) * desk.solved[i];
          }
        }
        for (int64_t j = 0; j < m; ++j) {
          g[j] = gradient[j];
          for (int64_t i = 0; i < m; ++i) g[j] += h[j * m + i] * (z[i] - x[i]);
        }
        if (t < kInf) continue;
      }
      int64_t most = -1;
      double wrong = 0;
      for (int64_t j = 0; j < m; ++j) {
        if (!held[j] || !(lower[j] < upper[j])) continue;
        const double pull = z[j] <= lower[j] ? -g[j] : g[j];
        if (pull > wrong) wrong = pull, most = j;
      }
      if (most < 0 || wrong <= 1e-13 * (1 + __builtin_fabs(gradient[most]))) break;
      held[most] = false;
    }
    return worst;
  }

  // What a step to desk.goal is worth; cut where the model cannot be trusted so far.
  struct Step {
    double slope, length, pivot;
  };
  Step step_from(const Point& point, Desk& desk) const {
    Step s;
    s.pivot = model_minimum(desk.goal, point, point.gradient, desk);
    for (int64_t j = 0; j < m; ++j) desk.step[j] = desk.goal[j] - point.mu[j];
    s.slope = dot(point.gradient, desk.step, m);
    s.length = norm(desk.step, m);
    return s;
  }
  void cut(Step& s, double size, Desk& desk) const {
    const double reach = 1e3 * (1 + size) / (s.length > 1e-300 ? s.length : 1e-300);
    if (!(reach < 1)) return;
    for (int64_t j = 0; j < m; ++j) desk.step[j] *= reach;
    s.slope *= reach;
  }
  void go(Point& trial, const Point& from, double t, const Desk& desk) const {
    for (int64_t j = 0; j < m; ++j) trial.mu[j] = clip(from.mu[j] + t * desk.step[j], problem.lower[j], problem.upper[j]);
  }
  // Minimum in (0, 1) of the cubic with values f0, f1 and slopes d0 < 0, d1 > 0 at its ends, kept inside.
  static double shorten(double f0, double d0, double f1, double d1) {
    const double a = d0 + d1 - 3 * (f1 - f0), square = a * a - d0 * d1;
    if (!finite(square) || square < 0) return 0.1;
    const double root = __builtin_sqrt(square), whole = d1 - d0 + 2 * root;
    return clip(whole > 0 ? 1 - (d1 + root - a) / whole : 0.5, 0.05, 0.8);
  }

  // Newton in float from `point` (desk.points[0]): desk.goal <- where the exact search may begin. Returns the residual
  // at the point whose model led there; 1 where that says nothing.
  double search(Point& point, Point& trial, Desk& desk, int64_t k, How how, double enough, int64_t& passes) {
    for (int done = 0; done < kMaxPasses; ++done) {
      const double size = norm(point.mu, m), left = residual(point);
      Step s = {};
      if (!(point.top < -problem.tol * size) && size <= kHuge) s = step_from(point, desk);
      if (!(s.slope < 0)) {
        copy(desk.goal, point.mu, m);
        return 1;
      }
      if (left <= enough && s.length <= 1 + size) return left;
      cut(s, size, desk);
      bool better = false;
      double t = 1;
      for (int tries = 0; tries < 8 && !better; ++tries) {
        go(trial, point, t, desk);
        evaluate(trial, desk, k, how);
        ++passes;
        better = trial.value <= point.value + 1e-4 * t * s.slope || trial.top < -problem.tol * norm(trial.mu, m);
        if (!better) t *= shorten(point.value, t * s.slope, trial.value, t * dot(trial.gradient, desk.step, m));
      }
      if (!better) {  // the last bits of a float: the exact search goes on from here
        copy(desk.goal, point.mu, m);
        return 1;
      }
      swap(point, trial);
    }
    copy(desk.goal, point.mu, m);
    return 1;
  }
  static void swap(Point& a, Point& b) {
    const Point kept = a;
    a = b, b = kept;
  }

  // Newton from `point`, whose value and gradient are exact. True where it met a certificate, mu / |mu|.
  bool newton(Point& point, Point& trial, Desk& desk, int64_t k, int64_t& passes, double* certificate) {
    const double tol = problem.tol;
    bool bounded = true, certified = false;
    for (int64_t j = 0; j < m; ++j) bounded = bounded && finite(problem.upper[j] - problem.lower[j]);
    int polished = 0;
    const auto refresh = [&] {
      evaluate(point, desk, k, How::exact);
      ++passes;
    };
    for (int done = 0; done < kMaxPasses; ++done) {
      const double size = norm(point.mu, m);
      if (!certified && point.top < -tol * size) {
        for (int64_t j = 0; j < m; ++j) certificate[j] = point.mu[j] / size;
        certified = true;
        if (!bounded) return true;
      }
      const double left = residual(point);
      if (left == 0 || size > kHuge) return certified;
      Step s = step_from(point, desk);
      const bool borrowed = point.model != Model::own;
      if ((point.model == Model::rough && s.pivot < kWellConditioned) || (borrowed && !(s.slope < 0))) {
        refresh();
        continue;
      }
      if (!(s.slope < 0)) return certified;
      if (left <= tol) {
        if (s.length <= 10 * tol * size || polished == kPolishSteps) return certified;
        if (borrowed) {
          refresh();
          continue;
        }
        ++polished;
      }
      cut(s, size, desk);
      const How how = borrowed || left * left <= tol ? How::slope : How::exact;
      double t = 1;
      bool taken = false;
      for (int tries = 0; tries < kLineSearch; ++tries) {
        go(trial, point, t, desk);
        if (how == How::slope) copy(trial.hessian, point.hessian, m * m), trial.model = point.model;
        evaluate(trial, desk, k, how);
        ++passes;
        // Near the minimum the dual stands still at its last bits; there the residual is what must fall.
        taken = trial.value <= point.value + 1e-4 * t * s.slope ||
                (trial.value <= point.value + 1e-12 * (1 + __builtin_fabs(point.value)) && residual(trial) < 0.5 * left);
        if (taken) break;
        if (left <= tol) return certified;
        if (!certified && trial.top < -tol * norm(trial.mu, m)) {
          taken = true;
          break;
        }
        if (borrowed) break;
        t *= shorten(point.value, t * s.slope, trial.value, t * dot(trial.gradient, desk.step, m));
      }
      if (!taken && !borrowed) return certified;
      if (!taken) {
        refresh();
        continue;
      }
      swap(point, trial);
      const double now = residual(point);
      if (point.model != Model::own && now > tol && now > kContraction * left) refresh();
    }
    return certified;
  }

  // Palette k from mu = 0, from a start, or beside a palette that is solved.
  void solve_one(const MapPoints& points, int64_t* passes, double* certificate, bool* certified, Desk& desk, int64_t k,
                 int64_t beside) {
    Point origin = {points.value[k], points.top[k], points.ess[k], points.mu + k * m, points.gradient + k * m,
                    points.hessian + k * m * m, Model::own};
    Point point = desk.point(0), trial = desk.point(1);
    desk.based = false;  // the bits must not depend on what this thread did before
    if (residual(origin) == 0) return;  // nothing is asked for that is not there
    assign(point, origin);
    double near = 1;
    const double* start = problem.start != nullptr ? problem.start + k * m : nullptr;
    if (beside >= 0) {
      // The solved palette's model at its own point, less what this one asks for differently.
      Point solved = {0, 0, 0, points.mu + beside * m, points.gradient + beside * m, desk.point(2).hessian, Model::near};
      copy(solved.hessian, points.hessian + beside * m * m, m * m);
      double* slope = desk.point(2).gradient;
      for (int64_t j = 0; j < m; ++j) {
        const double apart = problem.offset[k * m + j] - problem.offset[beside * m + j];
        slope[j] = problem.constant[j] ? 0.0 : solved.gradient[j] + apart / problem.scale[j];
      }
      model_minimum(desk.point(2).mu, solved, slope, desk);
      start = desk.point(2).mu;
    }
    if (start != nullptr) {
      for (int64_t j = 0; j < m; ++j) trial.mu[j] = clip(start[j], problem.lower[j], problem.upper[j]);
      evaluate(trial, desk, k, How::rough);
      ++passes[k];
      if (trial.value < origin.value) swap(point, trial);
    } else if (!columns.kept && in.n >= kEnoughRows) {
      int64_t ignored = 0;
      std::memset(trial.mu, 0, size_t(m) * sizeof(double));
      few_norm = 0;
      evaluate(trial, desk, k, How::few);
      few_norm = trial.value;
      trial.value = 0;
      if (finite(few_norm)) {
        swap(point, trial);
        search(point, trial, desk, k, How::few, kRoughEnough, ignored);
        copy(trial.mu, desk.goal, m);
        evaluate(trial, desk, k, How::rough);
        ++passes[k];
        if (trial.value < origin.value) swap(point, trial);
        else assign(point, origin);
      }
    }
    near = search(point, trial, desk, k, How::rough, columns.kept ? kRoughEnough : 5 * kRoughEnough, passes[k]);
    // An exact look at what was found; no lower than where all begins, it tells nothing.
    const Model model = point.model;
    copy(trial.mu, desk.goal, m), copy(trial.hessian, point.hessian, m * m);
    trial.model = model == Model::own ? Model::near : model;
    trial.value = kInf;
    if (finite(norm(trial.mu, m))) {
      evaluate(trial, desk, k, near <= kRoughModel ? How::slope : How::exact);
      ++passes[k];
    }
    if (trial.value < origin.value) swap(point, trial);
    else assign(point, origin);
    certified[k] = newton(point, trial, desk, k, passes[k], certificate + k * m);
    assign(origin, point);
    points.value[k] = point.value, points.top[k] = point.top, points.ess[k] = point.ess;
  }

  // The solved palette that asks for the nearest to what k does; -1: none. Those of a coarser grid alone are looked at.
  int64_t nearest(int64_t k, int64_t stride, const bool* certified) const {
    int64_t best = -1;
    double least = kInf;
    for (int64_t p = 0; p < problem.count; p += stride) {
      if (problem.skip[p] || certified[p]) continue;
      double apart = 0;
      for (int64_t j = 0; j < m; ++j) {
        const double d = (problem.offset[k * m + j] - problem.offset[p * m + j]) / problem.scale[j];
        apart += d * d;
      }
      if (apart < least) least = apart, best = p;
    }
    return best;
  }

  void solve_all(const MapPoints& points, int64_t* passes, double* certificate, bool* certified) {
    const int64_t count = problem.count;
    int64_t stride = 1;
    while (problem.start == nullptr && count / stride >= 8) stride *= 4;
    for (bool first = true; stride >= 1; stride /= 4, first = false) {
      // Palettes at multiples of the stride; those of the grid before, four times as coarse, are solved.
      int64_t known = 4 * stride;
      while (count / known > kNearest) known *= 4;
      const auto solve = [&](Desk& desk, int64_t i) {
        const int64_t k = i * stride;
        if (problem.skip[k] || (!first && i % 4 == 0)) return;
        solve_one(points, passes, certificate, certified, desk, k, first ? -1 : nearest(k, known, certified));
      };
      const int64_t here = (count + stride - 1) / stride;
      if (columns.kept) crew.each(here, [&](int thread, int64_t i) { solve(*desks[thread], i); });
      else for (int64_t i = 0; i < here; ++i) solve(*desks[0], i);  // one palette, whose passes the crew shares
    }
  }
};

void map_newton(const MapPoints& points, int64_t* passes, double* certificate, bool* certified, const MapProblem& problem,
                bool keep, int threads) {
  const MapInput& in = problem.rewards;
  const int64_t chunks = (in.n + kChunkRows - 1) / kChunkRows;
  threads = int(at_most(threads, keep ? problem.count : chunks));
  if (!keep) threads = int(at_most(threads, 1 + ((in.n * (in.m + 4) * (in.m + 4)) >> 21)));
  Desk** desks = static_cast<Desk**>(std::malloc(size_t(threads) * sizeof(Desk*)));
  for (int t = 0; t < threads; ++t) desks[t] = new Desk(in.m, keep ? in.n : 0);
  Crew::gather(threads, [&](Crew& crew) {
    Solver solver = {problem, in, crew, {}, desks, nullptr, 0, in.m, chunks, 0};
    const int64_t share = in.n / kFewRows;
    solver.few_stride = kRun * (share > kFewShare ? share : kFewShare);
    if (keep) {
      solver.columns.wide = solver.keep_columns<double>();
      solver.columns.narrow = solver.keep_columns<float>();
      solver.columns.reach = solver.largest_values();
      solver.columns.kept = true;
    } else {
      solver.chunk_sums = allocate_zeros<double>(chunks * Total::size(in.m));
    }
    solver.solve_all(points, passes, certificate, certified);
    std::free(solver.chunk_sums);
    std::free(solver.columns.wide);
    std::free(solver.columns.narrow);
    std::free(solver.columns.reach);
  });
  for (int t = 0; t < threads; ++t) delete desks[t];
  std::free(desks);
}

}  // namespace fastalign::FASTALIGN_LEVEL
