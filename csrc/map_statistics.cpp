// map_statistics: one pass of map_pass.h at given lambdas. Built once per level.
#include "map_pass.h"

namespace fastalign::FASTALIGN_LEVEL {

void map_statistics(double* out, const MapInput& in, const double* lambda, int64_t count, int threads) {
  const Pass pass(in, count, threads);
  ThreadPool::run(pass.threads, [&](ThreadPool& pool) { pass.run(out, lambda, count, 1, pool); });
}

}  // namespace fastalign::FASTALIGN_LEVEL
