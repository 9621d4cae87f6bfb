#include "map_small.h"

#include "map_tile.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr int64_t kSomeRows = 256;
constexpr double kConstant = 1e-14;
constexpr double kDoubtful = 1e-6;  // of the mean that it is about: what a deviation must have to be more than rounding

// center, size <- mean (an S: see rough in passes.py) and root mean square of some of the rows
template <typename S> static void look_at_some(double* center, double* size, const MapInput& in) {
  const int64_t stride = in.n / kSomeRows > 1 ? in.n / kSomeRows : 1, count = (in.n + stride - 1) / stride;
  for (int64_t j = 0; j < in.m; ++j) center[j] = size[j] = 0;
  for (int64_t i = 0; i < in.n; i += stride) {
    const S* row = row_of<S>(in, i);
    for (int64_t j = 0; j < in.m; ++j) {
      center[j] += double(row[j]);
      size[j] += double(row[j]) * double(row[j]);
    }
  }
  for (int64_t j = 0; j < in.m; ++j) {
    center[j] = double(S(center[j] / double(count)));
    size[j] = __builtin_sqrt(size[j] / double(count));
  }
}

bool is_positive_definite(const double* a, int64_t m, double ridge) {
  double* l = allocate_zeros<double>(m * m);
  bool positive = true;
  for (int64_t i = 0; i < m && positive; ++i) {
    for (int64_t j = 0; j <= i && positive; ++j) {
      double s = a[i * m + j] - (i == j ? ridge : 0.0);
      for (int64_t k = 0; k < j; ++k) s -= l[i * m + k] * l[j * m + k];
      positive = i != j || s > 0;
      l[i * m + j] = i == j ? __builtin_sqrt(s) : s / l[j * m + j];
    }
  }
  std::free(l);
  return positive;
}

bool map_small(const MapAnswer& out, const MapInput& given, const double* palette, const double* sign, double log_norm,
               double tol, double flat) {
  const int64_t m = given.m;
  double center[kMostValues], size[kMostValues], zero[kMostValues] = {}, scale[kMostValues], offset[kMostValues];
  double lower[kMostValues], upper[kMostValues], mu[kMostValues] = {}, gradient[kMostValues];
  const bool constant[kMostValues] = {}, skip = false;
  MapInput in = given;
  in.center = center;
  if (in.dtype == DType::float64) look_at_some<double>(center, size, in);
  else look_at_some<float>(center, size, in);

  double moments[3 + kMostValues + kMostValues * kMostValues], hessian[kMostValues * kMostValues];
  map_statistics(moments, in, zero, 1, 1);
  const double *mean = moments + 3, *cov = mean + m;
  for (int64_t j = 0; j < m; ++j) {
    const double most = __builtin_fmax(size[j], __builtin_fabs(center[j] + mean[j]));
    scale[j] = __builtin_sqrt(cov[j * m + j]);
    if (!(scale[j] > kConstant * most) || !(scale[j] > kDoubtful * __builtin_fabs(mean[j])) || !(scale[j] < kInf)) return false;
    offset[j] = center[j] - palette[j];
    gradient[j] = (mean[j] + offset[j]) / scale[j];
    lower[j] = sign[j] > 0 ? 0.0 : -kInf;
    upper[j] = sign[j] < 0 ? 0.0 : kInf;
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < m; ++j) hessian[i * m + j] = cov[i * m + j] / (scale[i] * scale[j]);
    const double moved = mean[i] / scale[i];
    hessian[i * m + i] += kRounding * (hessian[i * m + i] + moved * moved);
  }
  if (!is_positive_definite(hessian, m, flat)) return false;

  double value = moments[0] - log_norm, top = moments[2];
  *out.ess = moments[1];
  *out.passes = 0;
  double certificate[kMostValues];
  bool certified = false;
  const MapPoints points = {mu, &value, gradient, hessian, &top, out.ess};
  map_newton(points, out.passes, certificate, &certified, {in, 1, log_norm, tol, scale, offset, lower, upper, nullptr, constant, &skip}, true, 1);
  ++*out.passes;

  *out.residual = *out.gap = 0;
  for (int64_t j = 0; j < m; ++j) {
    const double off = __builtin_fabs(mu[j] - clip(mu[j] - gradient[j], lower[j], upper[j]));
    if (!(off <= *out.residual)) *out.residual = off;
    *out.gap += mu[j] * gradient[j];
    out.lam[j] = __builtin_fabs(mu[j]) <= tol ? 0.0 : mu[j] / scale[j];
    out.levels[j] = gradient[j] * scale[j] + palette[j];
  }
  *out.kl = __builtin_fmax(0.0, *out.gap - value);
  return *out.residual <= tol;
}

}  // namespace fastalign::FASTALIGN_LEVEL
