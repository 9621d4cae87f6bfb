// Blocks of tensors of any storage type as float or double, and back. Included only by the per-level files.
#pragma once

#include "simd.h"
#include "soup.h"

namespace fastalign::FASTALIGN_LEVEL {

// Eight-bit floats: kMantissa bits below an exponent with this bias. e4m3fn has one NaN a sign and no infinity.
template <int kMantissa, int kBias, bool kInfinity> struct float8 { uint8_t bits; };
using float8_e4m3fn = float8<3, 7, false>;
using float8_e5m2 = float8<2, 15, true>;

template <int kMantissa, int kBias, bool kInfinity>
struct Storage<float8<kMantissa, kBias, kInfinity>> : InOrder<float8<kMantissa, kBias, kInfinity>, float> {
  typedef float C;
  typedef float8<kMantissa, kBias, kInfinity> S;
  typedef Vec<float>::bits bits;
  typedef uint8_t bytes __attribute__((vector_size(kVectorBytes / 4), aligned(1), may_alias));
  static constexpr int kShift = 23 - kMantissa;
  static constexpr int kTop = kInfinity ? 0x7c : 0x7f;   // the smallest magnitude that is not a number
  static constexpr int kMost = kInfinity ? 0x7c : 0x7e;  // the result for numbers beyond the range

  static vec<float> load_wide(const S* p) {
    const bits u = __builtin_convertvector(*reinterpret_cast<const bytes*>(p), bits), magnitude = u & 0x7f;
    const bits normal = (magnitude << kShift) + ((127 - kBias) << 23);
    const bits subnormal = (bits)(__builtin_convertvector(magnitude, vec<float>) * kLeast);
    bits wide = magnitude < (1 << kMantissa) ? subnormal : normal;
    wide = magnitude >= kTop ? (kInfinity ? (magnitude - kTop) << kShift : bits{} + 0x400000) | 0x7f800000 : wide;
    return (vec<float>)(wide | (u & 0x80) << 24);
  }
  static void store_narrow(S* p, vec<float> x) {
    const bits u = (bits)x, magnitude = u & 0x7fffffff;
    const bits rebiased = magnitude - ((127 - kBias) << 23);
    bits narrow = (rebiased + ((1 << (kShift - 1)) - 1) + ((magnitude >> kShift) & 1)) >> kShift;
    // Below the normal numbers the float adder rounds, at the bit that kLeast is.
    const vec<float> shift = splat<float>(kLeast * 0x1p23f);
    const bits subnormal = (bits)((vec<float>)magnitude + shift) - (bits)shift;
    narrow = magnitude < ((128 - kBias) << 23) ? subnormal : narrow;
    narrow = narrow > kMost ? bits{} + kMost : narrow;
    narrow = magnitude > 0x7f800000 ? bits{} + 0x7f : narrow;
    *reinterpret_cast<bytes*>(p) = __builtin_convertvector(narrow | ((u >> 24) & 0x80), bytes);
  }

 private:
  static constexpr float kLeast = kInfinity ? 0x1p-16f : 0x1p-9f;  // 2^(1 - bias - mantissa)
};

constexpr int64_t kStep = 4 * lanes<float>;  // elements summed at a time
constexpr int64_t kBuffer = 1 << 13;         // wide elements of all inputs together

// A double as a float, rounded to odd: rounding that once more to fewer bits is rounding the double.
static inline float to_odd(double x) {
  const float nearest = float(x);
  uint32_t u = float_to_bits(nearest);
  if (double(nearest) == x || x != x || (u & 1)) return nearest;
  const double size = x < 0 ? -x : x, rounded = nearest < 0 ? -double(nearest) : double(nearest);
  u = rounded < size ? u + 1 : u - 1;
  return bits_to_float(u);
}

template <typename S, typename C> static void widen_block(C* wide, const void* from, int64_t first, int64_t n) {
  const S* p = static_cast<const S*>(from) + first;
  constexpr int64_t L = lanes<typename Storage<S>::C>;
  alignas(64) S rest[L] = {};
  for (int64_t j = 0; j < n; j += L) {
    const S* source = p + j;
    if (j + L > n) {
      __builtin_memcpy(static_cast<void*>(rest), source, size_t(n - j) * sizeof(S));
      source = rest;
    }
    const auto x = Storage<S>::load_wide(source);
    if constexpr (sizeof(C) == sizeof(typename Storage<S>::C)) {
      store<C>(wide + j, x);
    } else {
      for (int64_t l = 0; l < L; ++l) wide[j + l] = C(x[l]);
    }
  }
}

// count elements of every input, then zeros up to the end of the last step, because the padding is summed too.
template <typename C>
static void widen_blocks(C* buffer, int64_t stride, const C** wide, const void* const* ins, const SoupType* in_types,
                         int inputs, int64_t first, int64_t count) {
  for (int i = 0; i < inputs; ++i) {
    C* mine = buffer + i * stride;
    wide[i] = mine;
    switch (in_types[i]) {
      case SoupType::float64:
        if constexpr (sizeof(C) == 8) widen_block<double, C>(mine, ins[i], first, count);
        break;
      case SoupType::float32: widen_block<float, C>(mine, ins[i], first, count); break;
      case SoupType::bfloat16: widen_block<bfloat16, C>(mine, ins[i], first, count); break;
      case SoupType::float16: widen_block<float16, C>(mine, ins[i], first, count); break;
      case SoupType::float8_e4m3fn: widen_block<float8_e4m3fn, C>(mine, ins[i], first, count); break;
      case SoupType::float8_e5m2: widen_block<float8_e5m2, C>(mine, ins[i], first, count); break;
    }
    for (int64_t j = count; j % kStep != 0; ++j) mine[j] = 0;
  }
}

template <typename S, typename C> static inline void narrow_vectors(S* p, const C* sums, int64_t n) {
  typedef typename Storage<S>::C N;
  constexpr int64_t L = lanes<N>;
  for (int64_t j = 0; j < n; j += L) {
    vec<N> x;
    if constexpr (sizeof(C) == sizeof(N)) {
      x = load<C>(sums + j);
    } else {
      for (int64_t l = 0; l < L; ++l) x[l] = sizeof(S) == 4 ? N(sums[j + l]) : N(to_odd(double(sums[j + l])));
    }
    if (j + L <= n) {
      Storage<S>::store_narrow(p + j, x);
    } else {
      alignas(64) S rest[L];
      Storage<S>::store_narrow(rest, x);
      __builtin_memcpy(static_cast<void*>(p + j), rest, size_t(n - j) * sizeof(S));
    }
  }
}

// Whether sums are made in float64.
static inline bool any_wide(const SoupType* in_types, int inputs) {
  for (int i = 0; i < inputs; ++i) {
    if (in_types[i] == SoupType::float64) return true;
  }
  return false;
}

}  // namespace fastalign::FASTALIGN_LEVEL
