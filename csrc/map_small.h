// One palette over a few rows from beginning to end: on so little data the numpy around a solve takes longer than the solve.
#pragma once

#include "map_newton.h"

namespace fastalign {

// All of m values but the scalars. levels: of the rewards themselves.
struct MapAnswer {
  double *lam, *levels, *kl, *ess, *residual, *gap;
  int64_t* passes;
};

}  // namespace fastalign

FASTALIGN_DECLARE(
  // What fastalign/palette/_problem.py makes of the palette (m,), sign (m,): 1 for at least, -1 for at most, 0 for exactly.
  // False where anything is out of the ordinary, which is Python's to look into: rewards that are not finite, constant or
  // collinear; a palette that was not reached. in.center is not read.
  bool map_small(const MapAnswer& out, const MapInput& in, const double* palette, const double* sign, double log_norm,
                 double tol, double flat);
  // Whether a - ridge I has a Cholesky factor, for the lower half of a (m, m).
  bool is_positive_definite(const double* a, int64_t m, double ridge);
)
