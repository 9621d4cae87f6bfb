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
  // an input or the output is float64, else in float32. What an element becomes does not depend on where it stands.
  // float8_e4m3fn has no infinity: what lies beyond its range becomes its largest number. One thread.
  void soup_span(void* const* outs, SoupType out_type, int outputs, const void* const* ins, const SoupType* in_types,
                 int inputs, const double* weights, int64_t n);
  // dots[i * inputs + j] += ins[i] · ins[j], over n elements; centered: input 0 subtracted from the others first. Products are summed in float32 (float64 where an input is)
  // for some thousand elements, then in float64. One thread.
  void soup_dots_span(double* dots, const void* const* ins, const SoupType* in_types, int inputs, int64_t n,
                      bool centered);
  // How many of n elements are NaN or infinite, and the first of them, left alone where there is none. One thread.
  int64_t soup_not_finite(const void* x, SoupType type, int64_t n, int64_t* first);
)
