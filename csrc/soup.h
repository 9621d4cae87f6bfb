// Weighted sums of tensors in any mixture of storage types: K outputs of m inputs, each input element read once.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastalign {

// The order is that of FLOATS in fastalign/soup/checkpoint.py.
enum class SoupType : int { float64, float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 };
constexpr int kSoupTypes = 6;
constexpr int kSoupInputs = 128;  // at most

inline int64_t size_of(SoupType type) {
  return type == SoupType::float64 ? 8 : type == SoupType::float32 ? 4 : int(type) < 4 ? 2 : 1;
}

}  // namespace fastalign

FASTALIGN_DECLARE(
  // outs[k][j] = sum over i of weights[k * inputs + i] ins[i][j], j < n, added up in the order of i: in float64 where
  // an input or the output is float64, else in float32. An element's result does not depend on its position.
  // float8_e4m3fn has no infinity: numbers beyond its range become its largest number. One thread.
  void soup_span(void* const* outs, SoupType out_type, int outputs, const void* const* ins, const SoupType* in_types,
                 int inputs, const double* weights, int64_t n);
  // dots[i * inputs + j] += ins[i] · ins[j], over n elements; centered: after subtracting input 0 from the others.
  // Products are summed in float32 (float64 if an input is) over a few thousand elements, then in float64. One thread.
  void soup_dots_span(double* dots, const void* const* ins, const SoupType* in_types, int inputs, int64_t n,
                      bool centered);
  // How many of n elements are NaN or infinite; first: the first of them, unchanged if there is none. One thread.
  int64_t soup_not_finite(const void* x, SoupType type, int64_t n, int64_t* first);
)
