// map_newton: projected Newton with an exact active set and a safeguarded line search (fastalign/palette/_newton.py, which
// the tests hold it to), on map_dual.h. A start is first sought in float, whose passes take a third of the time, beside a
// palette that is solved or, of many palettes, in a power series; what is returned was evaluated in double. A pass that
// only confirms makes no covariance: a step may use that of a point nearby, and takes its own as soon as the residual does
// not fall a hundredfold. Built once per level.
#include "map_newton.h"

#include "map_dual.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr int kMaxPasses = 200, kLineSearch = 40, kPolishSteps = 3;
constexpr double kHuge = 1e12;
// A rough search ends at a residual from which one step more leaves about its square; from where that and the
// Hessian's own distance cost less than a pass, its Hessian serves on.
constexpr double kRoughEnough = 3e-3, kRoughModel = 4e-4, kContraction = 1e-2, kWellConditioned = 1e-3;
// A search in the series ends where one step more is as good as its digits; where its last terms are a larger share of
// Z than this it is not trusted.
constexpr double kSeriesEnough = 1e-5, kSeriesTrust = 1e-3;
// Coefficients that pay: at most so many a palette, and one in so many rows.
constexpr int kLeastDegree = 4, kMostDegree = 16, kSeriesShare = 4, kRowsEach = 8;
constexpr int64_t kNearest = 1024, kManyPalettes = 8;

struct Solver : Dual {
  void assign(Point& to, const Point& from) const {
    to.value = from.value, to.top = from.top, to.ess = from.ess, to.model = from.model, to.fresh = from.fresh;
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
      // Where it is flat, what is left to gain lies below a float's digits.
      const How how = polished > 0 ? How::exact : left * left <= tol ? How::slope : borrowed ? How::cheap : How::curved;
      double t = 1;
      bool taken = false;
      for (int tries = 0; tries < kLineSearch; ++tries) {
        go(trial, point, t, desk);
        copy(trial.hessian, point.hessian, m * m), trial.model = point.model;
        // Near the minimum the dual stands still at its last bits; there the residual is what must fall.
        const auto better = [&] {
          return trial.value <= point.value + 1e-4 * t * s.slope ||
                 (trial.value <= point.value + 1e-12 * (1 + __builtin_fabs(point.value)) && residual(trial) < 0.5 * left);
        };
        const auto look = [&](How as) {
          evaluate(trial, desk, k, as);
          ++passes;
          taken = better();
        };
        look(how);
        // A value that was summed in float may hide that.
        if (!taken && how != How::exact && residual(trial) < 0.5 * left) look(How::exact);
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
      if (!point.fresh && now > tol && now > kContraction * left) refresh();
    }
    return certified;
  }

  // Palette k from mu = 0, from a start, in the series, or beside the nearest palette of those at multiples of `known` (0:
  // none), which are solved.
  void solve_one(const MapPoints& points, int64_t* passes, double* certificate, bool* certified, Desk& desk, int64_t k,
                 int64_t known) {
    Point origin = {points.value[k], points.top[k], points.ess[k], points.mu + k * m, points.gradient + k * m,
                    points.hessian + k * m * m, Model::own, true};
    Point point = desk.point(0), trial = desk.point(1);
    desk.base.topped = desk.base.weighed = false;  // the bits must not depend on what this thread did before
    if (residual(origin) == 0) return;  // nothing is asked for that is not there
    assign(point, origin);
    if (series.degree > 0 && begin_in_series(point, trial, desk, k)) {
      evaluate(trial, desk, k, How::slope);
      ++passes[k];
    } else {
      trial.value = kInf;
    }
    if (!(trial.value < origin.value)) {
      assign(point, origin);
      const double* start = problem.start != nullptr ? problem.start + k * m : nullptr;
      const int64_t beside = known > 0 ? nearest(k, known, certified) : -1;
      if (beside >= 0) start = begin_beside(points, desk, k, beside);
      seek(point, trial, desk, k, passes[k], start);
    }
    if (trial.value < origin.value) swap(point, trial);
    else assign(point, origin);
    certified[k] = newton(point, trial, desk, k, passes[k], certificate + k * m);
    assign(origin, point);
    points.value[k] = point.value, points.top[k] = point.top, points.ess[k] = point.ess;
  }

  // Where palette k's minimum lies by the quadratic model of the solved palette p.
  const double* begin_beside(const MapPoints& points, Desk& desk, int64_t k, int64_t p) const {
    Point solved = {0, 0, 0, points.mu + p * m, points.gradient + p * m, desk.point(2).hessian, Model::near, false};
    copy(solved.hessian, points.hessian + p * m * m, m * m);
    double *slope = desk.point(2).gradient, *goal = desk.point(2).mu;
    for (int64_t j = 0; j < m; ++j) {
      const double apart = problem.offset[k * m + j] - problem.offset[p * m + j];
      slope[j] = problem.constant[j] ? 0.0 : solved.gradient[j] + apart / problem.scale[j];
    }
    model_minimum(goal, solved, slope, desk);
    return goal;
  }

  // trial <- where palette k's minimum lies by the series, with its covariance. False where the series does not say.
  bool begin_in_series(Point& point, Point& trial, Desk& desk, int64_t k) {
    copy(point.mu, series.center, m);
    evaluate(point, desk, k, How::series);
    int64_t ignored = 0;
    const double left = search(point, trial, desk, k, How::series, kSeriesEnough, ignored);
    if (!(left <= kSeriesEnough) || !(series.last_share(desk.factors, Total(desk.all, m).gram[0]) <= kSeriesTrust)) return false;
    copy(trial.mu, desk.goal, m), copy(trial.hessian, point.hessian, m * m);
    trial.model = Model::rough;
    Base& base = desk.base;
    for (int64_t j = 0; j < m; ++j) base.lambda[j] = series.center[j] / problem.scale[j];
    base.top = series.top;
    base.topped = true;
    return true;
  }

  // trial <- an exact look at what a search in float finds from start, or from the point; infinite where it found nothing.
  void seek(Point& point, Point& trial, Desk& desk, int64_t k, int64_t& passes, const double* start) {
    const double from = point.value;
    if (start != nullptr) {
      for (int64_t j = 0; j < m; ++j) trial.mu[j] = clip(start[j], problem.lower[j], problem.upper[j]);
      evaluate(trial, desk, k, How::rough);
      ++passes;
      if (trial.value < from) swap(point, trial);
    } else if (!columns.kept && in.n >= kEnoughRows) {
      int64_t ignored = 0;
      Point origin = desk.point(2);
      assign(origin, point);
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
        ++passes;
        if (trial.value < from) swap(point, trial);
        else assign(point, origin);
      }
    }
    const double near = search(point, trial, desk, k, How::rough, columns.kept ? kRoughEnough : 5 * kRoughEnough, passes);
    const Model model = point.model;
    copy(trial.mu, desk.goal, m), copy(trial.hessian, point.hessian, m * m);
    trial.model = model == Model::own ? Model::near : model;
    trial.value = kInf;
    if (finite(norm(trial.mu, m))) {
      evaluate(trial, desk, k, near <= kRoughModel ? How::slope : How::exact);
      ++passes;
    }
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
    while (problem.start == nullptr && count / stride >= kManyPalettes) stride *= 4;
    for (bool first = true; stride >= 1; stride /= 4, first = false) {
      // Palettes at multiples of the stride; those of the grid before, four times as coarse, are solved.
      int64_t known = 4 * stride;
      while (count / known > kNearest) known *= 4;
      const auto solve = [&](Desk& desk, int64_t i) {
        const int64_t k = i * stride;
        if (problem.skip[k] || (!first && i % 4 == 0)) return;
        solve_one(points, passes, certificate, certified, desk, k, first ? 0 : known);
      };
      const int64_t here = (count + stride - 1) / stride;
      if (columns.kept) crew.each(here, [&](int thread, int64_t i) { solve(*desks[thread], i); });
      else for (int64_t i = 0; i < here; ++i) solve(*desks[0], i);  // one palette, whose passes the crew shares
      if (first) expand_about(points, certified, stride);
    }
  }

  // The series about the middle of what the palettes at multiples of the stride came to, where many are left that it serves.
  void expand_about(const MapPoints& points, const bool* certified, int64_t stride) {
    const int degree = columns.kept && m <= kMostSeries ? series_degree() : 0;
    if (degree == 0) return;
    double* middle = desks[0]->goal;
    for (int64_t j = 0; j < m; ++j) {
      double low = kInf, high = -kInf;
      for (int64_t k = 0; k < problem.count; k += stride) {
        if (problem.skip[k] || certified[k]) continue;
        const double mu = points.mu[k * m + j];
        low = mu < low ? mu : low, high = mu > high ? mu : high;
      }
      if (!(low <= high)) return;
      middle[j] = 0.5 * (low + high);
    }
    expand(middle, degree);
  }
  // The highest degree whose moments cost little beside the passes that they spare; 0: none.
  int series_degree() const {
    int best = 0;
    for (int degree = kLeastDegree; degree <= kMostDegree; ++degree) {
      const int64_t size = Series::size(m, degree);
      if (size <= kSeriesShare * problem.count && size * kRowsEach <= in.n) best = degree;
    }
    return best;
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
    Solver solver = {{problem, in, crew, {}, desks, nullptr, 0, in.m, chunks, 0}};
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
    std::free(solver.series.coefficients);
    std::free(solver.columns.wide);
    std::free(solver.columns.narrow);
    std::free(solver.columns.reach);
  });
  for (int t = 0; t < threads; ++t) delete desks[t];
  std::free(desks);
}

}  // namespace fastalign::FASTALIGN_LEVEL
