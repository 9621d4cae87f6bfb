// Minimises the MAP dual for K palettes, without returning to Python between passes: the method of
// fastalign/palette/newton.py on the passes of map_pass.h.
#pragma once

#include "map_statistics.h"

namespace fastalign {

struct MapProblem {
  MapInput rewards;
  int64_t count;
  const double *palettes, *sign;  // (K, m); (m,) 1: at least, -1: at most, 0: exactly
  const double* start;            // (K, m) initial lambda, or null
  double tol, lam_max;            // bounds on the residual and on |lambda|
  // Null: the rewards' standard deviations are the units and no reward is constant. Otherwise: rewards marked in
  // constant (m,) stay at lambda = 0, and palettes marked in skip (K,) are not solved.
  const bool *constant, *skip;
};

// first: the moments at lambda = 0. scale (m,): the rewards' units, an input if constant is given. All others have a
// leading dimension K; mu = lambda scale. residual: the KKT residual. passes: how often all rows were read. certificate
// (K, m): where certified is set, a direction mu / |mu| in which every distribution falls short of the palette.
struct MapSolution {
  double *first, *scale, *mu, *value, *gradient, *ess, *residual, *certificate;
  bool* certified;
  int64_t* passes;
};

enum class MapVerdict { unmeasured, flat, steep };

}  // namespace fastalign

FASTALIGN_DECLARE(
  // unmeasured: some reward is not finite, or its variation may be rounding error; only `first` and `scale` were
  // written. flat: some combination of the rewards may be constant. The result does not depend on the number of
  // threads.
  MapVerdict map_newton(const MapSolution& out, const MapProblem& problem, int threads);
)
