// map_newton: projected Newton (Bertsekas 1982) with the quadratic model over the bounds solved exactly by an active
// set, and a safeguarded line search. All palettes step together, so that a pass serves every one that is still at
// work. Built once per level.
#include "map_newton.h"

#include "map_pass.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr int kMaxPasses = 200, kLineSearch = 40, kPolishSteps = 3;
// Beyond this lambda (in standard deviations) a policy is down to single samples, and only the feasibility test can
// decide.
constexpr double kHuge = 1e12;
// Rounding error of a covariance relative to the second moment; the share of the mean that a deviation must exceed to
// be more than rounding; the share of a reward's variance that counts as zero.
constexpr double kRounding = 16 * 0x1p-52, kDoubtful = 1e-6, kFlat = 2e-13;
// How many chunks a first estimate reads, how many times as many there must be for it to pay, and its residual.
constexpr int64_t kFewChunks = 64, kFewShare = 8;
constexpr double kFewEnough = 1e-3;
// From this many palettes on, every fourth is solved first and the others start near it; how many neighbours are
// searched.
constexpr int64_t kManyPalettes = 8, kNearest = 1024;

static double clip(double x, double low, double high) { return x < low ? low : x > high ? high : x; }
static bool finite(double x) { return x - x == 0; }
static void copy(double* to, const double* from, int64_t count) { std::memcpy(to, from, size_t(count) * sizeof(double)); }
static double dot(const double* a, const double* b, int64_t m) {
  double sum = 0;
  for (int64_t j = 0; j < m; ++j) sum += a[j] * b[j];
  return sum;
}
static double norm(const double* a, int64_t m) { return __builtin_sqrt(dot(a, a, m)); }

// l <- the factors of A = L D L^T, D on the diagonal, for the rows and columns `free` of h, minus ridge times the
// identity; a pivot below rounding is raised to it. False if a pivot was not positive.
static bool factorise(double* l, const double* h, const int64_t* free, int64_t count, int64_t m, double ridge) {
  bool positive = true;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double s = h[free[i] * m + free[j]] - (i == j ? ridge : 0.0);
      for (int64_t k = 0; k < j; ++k) s -= l[i * m + k] * l[j * m + k] * l[k * m + k];
      if (i > j) {
        l[i * m + j] = s / l[j * m + j];
        continue;
      }
      positive = positive && s > 0;
      const double least = 0x1p-52 * h[free[i] * m + free[i]] + 1e-290;
      l[i * m + i] = s > least ? s : least;
    }
  }
  return positive;
}

// Data common to all palettes, in units of the rewards' standard deviations.
struct Dual {
  MapProblem problem;
  int64_t m;
  const double *mean, *scale;        // at lambda = 0, from the center
  double *lower, *upper, *hessian;   // bounds on mu; the covariance at lambda = 0
  double norm_of_weights;            // log sum w of the rows read

  double offset(int64_t k, int64_t j) const { return problem.rewards.center[j] - problem.palettes[k * m + j]; }
  bool constant(int64_t j) const { return problem.constant != nullptr && problem.constant[j]; }

  void gradient(double* out, int64_t k, const double* mean_there) const {
    for (int64_t j = 0; j < m; ++j) out[j] = constant(j) ? 0.0 : (mean_there[j] + offset(k, j)) / scale[j];
  }
  // Rounding may make a covariance negative; if the distribution is down to a few samples, that is all there is.
  void curvature(double* out, const double* moments) const {
    const double *mean_there = moments + 3, *cov = mean_there + m;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < m; ++j) out[i * m + j] = cov[i * m + j] / (scale[i] * scale[j]);
      const double moved = mean_there[i] / scale[i];
      out[i * m + i] += kRounding * (out[i * m + i] + moved * moved);
    }
  }
  double residual(const double* mu, const double* gradient) const {
    double most = 0;
    for (int64_t j = 0; j < m; ++j) {
      const double off = __builtin_fabs(mu[j] - clip(mu[j] - gradient[j], lower[j], upper[j]));
      if (!(off <= most)) most = off;
    }
    return most;
  }
};

// Scratch memory of the active-set method.
struct Scratch {
  double *factor, *solved, *slope;
  int64_t* free;
  bool* at_bound;
  static int64_t size(int64_t m) { return m * m + 4 * m; }
  Scratch(double* at, int64_t m)
      : factor(at), solved(at + m * m), slope(solved + m), free(reinterpret_cast<int64_t*>(slope + m)),
        at_bound(reinterpret_cast<bool*>(free + m)) {}
};

// z <- argmin within the bounds of 1/2 (z-x)' H (z-x) + gradient.(z-x) from x, by a primal active-set method; see
// fastalign/palette/newton.py.
static void model_minimum(double* z, const Dual& dual, const double* x, const double* gradient, double* h, const Scratch& work) {
  const int64_t m = dual.m;
  const double *lower = dual.lower, *upper = dual.upper;
  double *g = work.slope, *l = work.factor, *step = work.solved, largest = 0;
  int64_t* free = work.free;
  bool* at_bound = work.at_bound;
  for (int64_t j = 0; j < m; ++j) largest = h[j * m + j] > largest ? h[j * m + j] : largest;
  // For a constant reward, or a policy of a single sample, there is nothing to divide by.
  for (int64_t j = 0; j < m; ++j) {
    if (!(h[j * m + j] >= 1e-14 * largest + 1e-280)) h[j * m + j] = 1e-14 * largest + 1e-280;
  }
  for (int64_t j = 0; j < m; ++j) {
    z[j] = x[j], g[j] = gradient[j];
    at_bound[j] = !((x[j] > lower[j] || g[j] < 0) && (x[j] < upper[j] || g[j] > 0) && lower[j] < upper[j]);
  }
  for (int64_t round = 0; round < 10 * m + 20; ++round) {
    int64_t count = 0;
    for (int64_t j = 0; j < m; ++j) {
      if (!at_bound[j]) free[count++] = j;
    }
    if (count > 0) {
      factorise(l, h, free, count, m, 0);
      for (int64_t i = 0; i < count; ++i) {
        step[i] = -g[free[i]];
        for (int64_t k = 0; k < i; ++k) step[i] -= l[i * m + k] * step[k];
      }
      for (int64_t i = 0; i < count; ++i) step[i] /= l[i * m + i];
      for (int64_t i = count - 1; i >= 0; --i) {
        for (int64_t k = i + 1; k < count; ++k) step[i] -= l[k * m + i] * step[k];
      }
      const auto end_of = [&](int64_t j, double goal) { return goal < lower[j] ? lower[j] : goal > upper[j] ? upper[j] : goal; };
      double t = kInf;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t j = free[i];
        const double goal = z[j] + step[i], end = end_of(j, goal);
        if (goal != end && (end - z[j]) / step[i] < t) t = (end - z[j]) / step[i];
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t j = free[i];
        const double goal = z[j] + step[i], end = end_of(j, goal);
        at_bound[j] = goal != end && (end - z[j]) / step[i] <= t;
        z[j] = at_bound[j] ? end : z[j] + (t < kInf ? t : 1.0) * step[i];
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
      if (!at_bound[j] || !(lower[j] < upper[j])) continue;
      const double pull = z[j] <= lower[j] ? -g[j] : g[j];
      if (pull > wrong) wrong = pull, most = j;
    }
    if (most < 0 || wrong <= 1e-13 * (1 + __builtin_fabs(gradient[most]))) break;
    at_bound[most] = false;
  }
}

// Minimum in (0, 1) of the cubic with values f0, f1 and slopes d0 < 0, d1 > 0 at its ends, kept inside.
static double shorten(double f0, double d0, double f1, double d1) {
  const double a = d0 + d1 - 3 * (f1 - f0), square = a * a - d0 * d1;
  if (!finite(square) || square < 0) return 0.1;
  const double root = __builtin_sqrt(square), whole = d1 - d0 + 2 * root;
  return clip(whole > 0 ? 1 - (d1 + root - a) / whole : 0.5, 0.05, 0.8);
}

// One palette's iteration between passes: the best point so far, and the trial point to evaluate next.
struct Newton {
  struct Point {
    double *mu, *gradient, value, top, ess;
  };
  const Dual* dual;
  Point point, trial;
  double *hessian, *step, *scratch, *certificate;
  double left, slope, t, tol;
  int64_t k, passes, iterations;
  int tries, polished;
  bool certified, going;

  void begin(int64_t palette, double tolerance) { k = palette, tol = tolerance, iterations = tries = polished = 0; }

  // trial <- the pass's result
  void see(const double* moments) {
    double shift = 0;
    for (int64_t j = 0; j < dual->m; ++j) shift += trial.mu[j] / dual->scale[j] * dual->offset(k, j);
    trial.value = moments[0] - dual->norm_of_weights + shift;
    trial.top = moments[2] + shift;
    trial.ess = moments[1];
    dual->gradient(trial.gradient, k, moments + 3);
  }
  // point <- trial
  void take(const double* moments) {
    const Point kept = point;
    point = trial, trial = kept;
    dual->curvature(hessian, moments);
  }
  // max_i mu.(R_i - c) < 0: no mixture of the samples reaches c (Farkas).
  bool falls_short(const Point& p) const { return p.top < -tol * norm(p.mu, dual->m); }

  void place_trial() {
    for (int64_t j = 0; j < dual->m; ++j) trial.mu[j] = clip(point.mu[j] + t * step[j], dual->lower[j], dual->upper[j]);
  }

  // step <- to the model's minimum
  void inner_solve() {
    model_minimum(step, *dual, point.mu, point.gradient, hessian, Scratch(scratch, dual->m));
    for (int64_t j = 0; j < dual->m; ++j) step[j] -= point.mu[j];
    slope = dot(point.gradient, step, dual->m);
  }

  // Where the dual is flat the residual may be small while lambda is still off: take a few more steps until lambda
  // settles.
  bool check_convergence(double length, double size) {
    if (!(slope < 0)) return true;
    if (!(left <= tol)) return false;
    return length <= 10 * tol * size || polished++ == kPolishSteps;
  }

  // Sets the next trial point; false if the iteration ends.
  bool next() {
    const int64_t m = dual->m;
    const double size = norm(point.mu, m);
    if (!certified && falls_short(point)) {
      certified = true;
      bool bounded = true;  // then the minimum exists for any palette, and the search continues
      for (int64_t j = 0; j < m; ++j) {
        certificate[j] = point.mu[j] / size;
        bounded = bounded && finite(dual->upper[j] - dual->lower[j]);
      }
      if (!bounded) return false;
    }
    left = dual->residual(point.mu, point.gradient);
    if (left == 0 || size > kHuge || iterations++ == kMaxPasses) return false;
    inner_solve();
    const double length = norm(step, m);
    if (check_convergence(length, size)) return false;
    const double reach = 1e3 * (1 + size) / (length > 1e-300 ? length : 1e-300);  // beyond, the model is not trusted
    for (int64_t j = 0; j < m && reach < 1; ++j) step[j] *= reach;
    if (reach < 1) slope *= reach;
    t = 1, tries = 0;
    place_trial();
    return true;
  }

  // After the trial's pass: accepts it, or shortens the step. False if the iteration ends.
  bool line_search(const double* moments) {
    ++passes;
    see(moments);
    // Near the minimum the dual no longer changes beyond its last bits; then the residual has to decrease.
    const bool better = trial.value <= point.value + 1e-4 * t * slope ||
                        (trial.value <= point.value + 1e-12 * (1 + __builtin_fabs(point.value)) &&
                         dual->residual(trial.mu, trial.gradient) < 0.5 * left);
    if (!better && left <= tol) return false;
    if (better || (!certified && falls_short(trial))) {
      take(moments);
      return next();
    }
    if (++tries == kLineSearch) return false;
    t *= shorten(point.value, t * slope, trial.value, t * dot(trial.gradient, step, dual->m));
    place_trial();
    return true;
  }
};

class NewtonSolver {
 public:
  NewtonSolver(const MapSolution& out, const MapProblem& problem, const Pass& pass, ThreadPool& pool)
      : out_(out), problem_(problem), pass_(pass), pool_(pool), m_(problem.rewards.m), count_(problem.count) {
    const int64_t m = m_, each = m * m + 5 * m + Scratch::size(m), moments = pass.moments;
    memory_ = allocate_zeros<double>(2 * m + m * m + moments + count_ * (each + m + moments));
    newton_ = static_cast<Newton*>(std::calloc(size_t(count_), sizeof(Newton)));
    active_ = static_cast<int64_t*>(std::calloc(size_t(count_), sizeof(int64_t)));
    double* at = memory_;
    const auto take = [&](int64_t size) { double* given = at; at += size; return given; };
    dual_ = {problem, m, out.first + 3, out.scale, take(m), take(m), take(m * m), out.first[0]};
    few_ = take(moments), lambda_ = take(count_ * m), found_ = take(count_ * moments);
    for (int64_t k = 0; k < count_; ++k) {
      Newton& own = newton_[k];
      own.point = {take(m), take(m), 0, 0, 0}, own.trial = {take(m), take(m), 0, 0, 0};
      own.step = take(m), own.hessian = take(m * m), own.scratch = take(Scratch::size(m));
      own.dual = &dual_, own.certificate = out.certificate + k * m;
    }
  }
  NewtonSolver(const NewtonSolver&) = delete;
  ~NewtonSolver() {
    std::free(memory_);
    std::free(newton_);
    std::free(active_);
  }

  // Sets the units and every palette's point at 0; false if a unit is in doubt.
  bool measure() {
    const double* cov = dual_.mean + m_;
    bool measured = true;
    for (int64_t j = 0; j < m_ && problem_.constant == nullptr; ++j) {
      const double deviation = __builtin_sqrt(cov[j * m_ + j]), mean = __builtin_fabs(dual_.mean[j]);
      out_.scale[j] = deviation;
      measured = measured && finite(mean) && deviation > kDoubtful * mean && deviation > 1e-40 && deviation < 1e40;
    }
    return measured;
  }

  MapVerdict solve() {
    setup();
    int64_t stride = 1;
    while (problem_.start == nullptr && count_ / stride >= kManyPalettes) stride *= 4;
    for (bool first = true; stride >= 1; stride /= 4, first = false) {
      const int64_t here = choose(stride, first);
      if (problem_.start != nullptr) start_at_given(here);
      else if (!first) start_beside(here, 4 * stride);
      else if (pass_.chunks >= kFewShare * kFewChunks) start_on_few(here, stride);
      iterate(here, 1, problem_.tol);
    }
    for (int64_t k = 0; k < count_; ++k) {
      const Newton& own = newton_[k];
      copy(out_.mu + k * m_, own.point.mu, m_), copy(out_.gradient + k * m_, own.point.gradient, m_);
      out_.value[k] = own.point.value, out_.ess[k] = own.point.ess;
      out_.residual[k] = dual_.residual(own.point.mu, own.point.gradient);
      out_.passes[k] = own.passes + 1, out_.certified[k] = own.certified;
    }
    return is_steep() ? MapVerdict::steep : MapVerdict::flat;
  }

 private:
  const MapSolution& out_;
  const MapProblem& problem_;
  const Pass& pass_;
  ThreadPool& pool_;
  const int64_t m_, count_;
  double *memory_, *few_, *lambda_, *found_;
  Newton* newton_;
  int64_t* active_;
  Dual dual_;

  void setup() {
    for (int64_t j = 0; j < m_; ++j) {
      const double bound = dual_.constant(j) ? 0.0 : problem_.lam_max * dual_.scale[j];
      dual_.lower[j] = problem_.sign[j] > 0 ? 0.0 : -bound;
      dual_.upper[j] = problem_.sign[j] < 0 ? 0.0 : bound;
    }
    dual_.curvature(dual_.hessian, out_.first);
    for (int64_t k = 0; k < count_; ++k) put_at_zero(k, out_.first, problem_.tol);
  }
  void put_at_zero(int64_t k, const double* moments, double tol) {
    Newton& own = newton_[k];
    own.begin(k, tol);
    std::memset(own.trial.mu, 0, size_t(m_) * sizeof(double));
    own.see(moments);
    own.take(moments);
  }

  // Whether no combination of the varying rewards is constant.
  bool is_steep() const {
    const Scratch work(newton_[0].scratch, m_);
    int64_t moving = 0;
    for (int64_t j = 0; j < m_; ++j) {
      if (!dual_.constant(j)) work.free[moving++] = j;
    }
    return factorise(work.factor, dual_.hessian, work.free, moving, m_, kFlat * double(moving));
  }

  // Makes the palettes at multiples of the stride active, except those of the previous grid; returns how many.
  int64_t choose(int64_t stride, bool first) {
    int64_t here = 0;
    for (int64_t i = 0; i * stride < count_; ++i) {
      if ((first || i % 4 != 0) && !skipped(i * stride)) active_[here++] = i * stride;
    }
    return here;
  }
  bool skipped(int64_t k) const { return problem_.skip != nullptr && problem_.skip[k]; }

  // Newton's method on the first `here` active palettes, from their points, over every stride-th chunk.
  void iterate(int64_t here, int64_t stride, double tol) {
    each(here, [&](Newton& own, int64_t) {
      own.begin(own.k, tol);
      own.going = own.next();
    });
    while ((here = still_going(here)) > 0) {
      evaluate(here, stride);
      each(here, [&](Newton& own, int64_t i) {
        own.going = own.line_search(found_ + i * pass_.moments);
      });
    }
  }
  int64_t still_going(int64_t here) {
    int64_t kept = 0;
    for (int64_t i = 0; i < here; ++i) {
      if (newton_[active_[i]].going) active_[kept++] = active_[i];
    }
    return kept;
  }
  template <typename F> void each(int64_t here, const F& f) {
    pool_.for_each(here, [&](int, int64_t i) { f(newton_[active_[i]], i); });
  }
  // found_ <- the moments at the trials of the first `here` active palettes
  void evaluate(int64_t here, int64_t stride) {
    for (int64_t i = 0; i < here; ++i) {
      for (int64_t j = 0; j < m_; ++j) lambda_[i * m_ + j] = newton_[active_[i]].trial.mu[j] / dual_.scale[j];
    }
    pass_.run(found_, lambda_, here, stride, pool_);
  }

  // For the first `here` active palettes, a trial that is lower than the point replaces it.
  void start_at_trials(int64_t here) {
    evaluate(here, 1);
    each(here, [&](Newton& own, int64_t i) {
      ++own.passes;
      own.see(found_ + i * pass_.moments);
      if (own.trial.value < own.point.value) own.take(found_ + i * pass_.moments);
    });
  }
  void start_at_given(int64_t here) {
    for (int64_t i = 0; i < here; ++i) {
      Newton& own = newton_[active_[i]];
      for (int64_t j = 0; j < m_; ++j) {
        own.trial.mu[j] = clip(problem_.start[own.k * m_ + j] * dual_.scale[j], dual_.lower[j], dual_.upper[j]);
      }
    }
    start_at_trials(here);
  }

  // Each starts at the minimum predicted by the quadratic model of the nearest solved palette, among the multiples of
  // `known`.
  void start_beside(int64_t here, int64_t known) {
    while (count_ / known > kNearest) known *= 4;
    each(here, [&](Newton& own, int64_t) {
      const int64_t p = nearest(own.k, known);
      if (p < 0) return;
      const Newton& solved = newton_[p];
      copy(own.hessian, solved.hessian, m_ * m_);
      for (int64_t j = 0; j < m_; ++j) {
        const double apart = (dual_.offset(own.k, j) - dual_.offset(p, j)) / dual_.scale[j];
        own.step[j] = solved.point.gradient[j] + (dual_.constant(j) ? 0.0 : apart);
      }
      model_minimum(own.trial.mu, dual_, solved.point.mu, own.step, own.hessian, Scratch(own.scratch, m_));
      copy(own.hessian, dual_.hessian, m_ * m_);
    });
    start_at_trials(here);
  }
  int64_t nearest(int64_t k, int64_t known) const {
    int64_t best = -1;
    double least = kInf;
    for (int64_t p = 0; p < count_; p += known) {
      if (newton_[p].certified || skipped(p)) continue;
      double apart = 0;
      for (int64_t j = 0; j < m_; ++j) {
        const double d = (dual_.offset(k, j) - dual_.offset(p, j)) / dual_.scale[j];
        apart += d * d;
      }
      if (apart < least) least = apart, best = p;
    }
    return best;
  }

  // Each starts at its solution on a few of the chunks.
  void start_on_few(int64_t here, int64_t grid) {
    const int64_t stride = pass_.chunks / kFewChunks;
    std::memset(lambda_, 0, size_t(m_) * sizeof(double));
    pass_.run(few_, lambda_, 1, stride, pool_);
    dual_.norm_of_weights = few_[0];
    for (int64_t i = 0; i < here; ++i) put_at_zero(active_[i], few_, kFewEnough);
    iterate(here, stride, kFewEnough);
    dual_.norm_of_weights = out_.first[0];
    choose(grid, true);
    each(here, [&](Newton& own, int64_t) {
      const bool useful = !own.certified && finite(norm(own.point.mu, m_));
      copy(own.step, own.point.mu, m_);
      put_at_zero(own.k, out_.first, problem_.tol);
      for (int64_t j = 0; j < m_; ++j) own.trial.mu[j] = useful ? own.step[j] : 0.0;
      own.certified = false, own.passes = 0;
    });
    start_at_trials(here);
  }
};

MapVerdict map_newton(const MapSolution& out, const MapProblem& problem, int threads) {
  const Pass pass(problem.rewards, problem.count, threads);
  MapVerdict verdict = MapVerdict::unmeasured;
  ThreadPool::run(pass.threads, [&](ThreadPool& pool) {
    double* const zero = allocate_zeros<double>(problem.rewards.m);
    pass.run(out.first, zero, 1, 1, pool);
    std::free(zero);
    NewtonSolver solver(out, problem, pass, pool);
    if (solver.measure()) verdict = solver.solve();
  });
  return verdict;
}

}  // namespace fastalign::FASTALIGN_LEVEL
