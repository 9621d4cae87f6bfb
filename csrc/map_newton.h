// The MAP dual minimised for K palettes, whole solves without Python between the passes: fastalign/palette/newton.py's
// method, on the passes of map_pass.h.
#pragma once

#include "map_statistics.h"

namespace fastalign {

struct MapProblem {
  MapInput rewards;
  int64_t count;
  const double *palettes, *sign;  // (K, m); (m,) 1: at least, -1: at most, 0: exactly
  const double* start;            // (K, m) lambda to begin at, or null
  double tol, lam_max;            // bounds on the residual and on |lambda|
  // Null: the rewards' standard deviations are taken for units and none is constant. Else given: constant (m,) rewards are
  // left at lambda = 0, skip (K,) palettes alone.
  const bool *constant, *skip;
};

// What was found. first: the moments at lambda = 0, scale (m,) the rewards' units, given where constant is. The rest leads
// with K; mu = lambda scale. residual: how far off the minimum; passes: how often all rows were read; certificate (K, m): where certified, a direction
// mu / |mu| in which every law falls short of the palette.
struct MapSolution {
  double *first, *scale, *mu, *value, *gradient, *ess, *residual, *certificate;
  bool* certified;
  int64_t* passes;
};

enum class MapVerdict { unmeasured, flat, steep };

}  // namespace fastalign

FASTALIGN_DECLARE(
  // unmeasured: some reward is not finite, or varies by no more than rounding may have made: `first` and `scale` alone were
  // written. flat: some combination of the rewards may be constant. The same bits at any number of threads.
  MapVerdict map_newton(const MapSolution& out, const MapProblem& problem, int threads);
)
