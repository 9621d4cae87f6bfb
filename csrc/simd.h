// Vectors of the level that is being compiled: float and double lanes, loads and stores of every storage type,
// exp. Only GCC's vector extensions, so that one body serves SSE2, AVX2, AVX-512 and NEON.
//
// Included only by the per-level files (see isa.h). They use no STL function or container that the linker could
// share with code for an older processor; algorithms from <algorithm> only with our own comparator type.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "dtype.h"

#ifndef FASTALIGN_LEVEL
#error "compile this file once per level, with -DFASTALIGN_LEVEL=baseline|avx2|avx512"
#endif

namespace fastalign::FASTALIGN_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Vec<C>: lanes of the compute type C, and integers of the same width.
template <typename C> struct Vec;
template <> struct Vec<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int lanes = kVectorBytes / 4;
};
template <> struct Vec<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int lanes = kVectorBytes / 8;
};
template <typename C> using vec = typename Vec<C>::type;
template <typename C> constexpr int lanes = Vec<C>::lanes;

template <typename C> inline vec<C> splat(C x) { return x - vec<C>{}; }
template <typename C> inline vec<C> load(const C* p) { return *reinterpret_cast<const typename Vec<C>::unaligned*>(p); }
template <typename C> inline void store(C* p, vec<C> x) { *reinterpret_cast<typename Vec<C>::unaligned*>(p) = x; }

// a > b ? a : b in each lane, b if either is NaN: one instruction that GCC does not generate by itself.
template <typename C> inline vec<C> greater(vec<C> a, vec<C> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) return (vec<C>)_mm512_max_ps((__m512)a, (__m512)b);
  else return (vec<C>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(C) == 4) return (vec<C>)_mm256_max_ps((__m256)a, (__m256)b);
  else return (vec<C>)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__SSE2__)
  if constexpr (sizeof(C) == 4) return (vec<C>)_mm_max_ps((__m128)a, (__m128)b);
  else return (vec<C>)_mm_max_pd((__m128d)a, (__m128d)b);
#else
  return a > b ? a : b;
#endif
}
// A NaN in x never becomes the maximum; the sums propagate it instead.
template <typename C> inline vec<C> max(vec<C> m, vec<C> x) { return greater<C>(x, m); }
// x, but no less than low; a NaN stays.
template <typename C> inline vec<C> at_least(C low, vec<C> x) { return greater<C>(splat<C>(low), x); }

// Halves of halves, so that the steps that wait for each other are few.
template <typename C, int N, typename F> inline C fold(const C* x, F f) {
  if constexpr (N == 1) return x[0];
  else {
    C half[N / 2];
    for (int i = 0; i < N / 2; ++i) half[i] = f(x[i], x[i + N / 2]);
    return fold<C, N / 2>(half, f);
  }
}
template <typename C> inline C reduce_add(vec<C> x) {
  C all[lanes<C>];
  store<C>(all, x);
  return fold<C, lanes<C>>(all, [](C a, C b) { return a + b; });
}
template <typename C> inline C reduce_max(vec<C> x) {
  C all[lanes<C>];
  store<C>(all, x);
  return fold<C, lanes<C>>(all, [](C a, C b) { return b > a ? b : a; });
}

// ---- storage types: widen one, widen a vector of them, narrow with round-to-nearest-even ----

typedef uint16_t half_lanes __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef Vec<float>::bits bits32;
typedef int32_t unaligned_bits32 __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
typedef uint32_t unsigned32 __attribute__((vector_size(kVectorBytes)));

inline float bits_to_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t float_to_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

template <typename S> struct Storage;  // S -> compute type C

// Two neighbouring vectors in whatever order is cheap, the same for loads and stores; Storage<bfloat16> has its own.
template <typename S, typename C> struct InOrder {
  static void load_pair(const S* p, vec<C>& a, vec<C>& b) {
    a = Storage<S>::load_wide(p);
    b = Storage<S>::load_wide(p + lanes<C>);
  }
  static void store_pair(S* p, vec<C> a, vec<C> b) {
    Storage<S>::store_narrow(p, a);
    Storage<S>::store_narrow(p + lanes<C>, b);
  }
};

template <> struct Storage<float> : InOrder<float, float> {
  typedef float C;
  static float widen(float x) { return x; }
  static vec<float> load_wide(const float* p) { return load<float>(p); }
  static void store_narrow(float* p, vec<float> x) { store<float>(p, x); }
  static float narrow(float x) { return x; }
};

template <> struct Storage<double> : InOrder<double, double> {
  typedef double C;
  static double widen(double x) { return x; }
  static vec<double> load_wide(const double* p) { return load<double>(p); }
  static void store_narrow(double* p, vec<double> x) { store<double>(p, x); }
  static double narrow(double x) { return x; }
};

template <> struct Storage<bfloat16> {
  typedef float C;
  static float widen(bfloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
  static vec<float> load_wide(const bfloat16* p) {
    const half_lanes h = *reinterpret_cast<const half_lanes*>(p);
    return (vec<float>)(__builtin_convertvector(h, unsigned32) << 16);
  }
  static bfloat16 narrow(float x) {
    uint32_t u = float_to_bits(x);
    if (x != x) return {uint16_t((u >> 16) | 0x40)};
    return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
  }
  static void store_narrow(bfloat16* p, vec<float> x) {
    const unsigned32 u = (unsigned32)x;  // of a NaN the sum runs over
    const bits32 rounded = (bits32)((u + 0x7fff + ((u >> 16) & 1)) >> 16), quiet_nan = (bits32)((u >> 16) | 0x40);
    const bits32 result = (x == x) ? rounded : quiet_nan;
    *reinterpret_cast<half_lanes*>(p) = __builtin_convertvector(result, half_lanes);
  }
  // Two vectors at once, the even elements and the odd ones: half the steps of doing them in order. A NaN to be
  // stored must have its 16 low bits clear, as every NaN has that arithmetic made of bfloat16 numbers.
  static void load_pair(const bfloat16* p, vec<float>& even, vec<float>& odd) {
    const bits32 u = *reinterpret_cast<const unaligned_bits32*>(p);
    even = (vec<float>)(u << 16);
    odd = (vec<float>)(u & int32_t(0xffff0000));
  }
  static void store_pair(bfloat16* p, vec<float> even, vec<float> odd) {
    const unsigned32 a = (unsigned32)even, b = (unsigned32)odd;
    const unsigned32 low = (a + 0x7fff + ((a >> 16) & 1)) >> 16, high = (b + 0x7fff + ((b >> 16) & 1)) & 0xffff0000u;
    *reinterpret_cast<unaligned_bits32*>(p) = (bits32)(low | high);
  }
};

template <> struct Storage<float16> : InOrder<float16, float> {
  typedef float C;
  static float widen(float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (magnitude << 13));
    // Shifting changes the exponent's bias from 15 to 127 - 112; the product corrects it, also for subnormals.
    return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
  }
  static float16 narrow(float x) {
    const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to infinity
    if (magnitude < 0x38800000) {  // subnormal: let the float adder round at bit 2^-24
      const float shifted = bits_to_float(magnitude) + 0.5f;
      return {uint16_t(sign | (float_to_bits(shifted) - 0x3f000000))};
    }
    return {uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13))};
  }
#if defined(__AVX512F__)
  static vec<float> load_wide(const float16* p) {
    return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_narrow(float16* p, vec<float> x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__F16C__)
  static vec<float> load_wide(const float16* p) {
    return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_narrow(float16* p, vec<float> x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  static vec<float> load_wide(const float16* p) {
    vec<float> x;
    for (int i = 0; i < lanes<float>; ++i) x[i] = widen(p[i]);
    return x;
  }
  static void store_narrow(float16* p, vec<float> x) {
    for (int i = 0; i < lanes<float>; ++i) p[i] = narrow(x[i]);
  }
#endif
};

// ---- exp: about one unit in the last place; exp(-inf) = 0, exp(NaN) = NaN ----

// x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite, two-part ln 2), a polynomial in r, then n into the exponent.
inline vec<float> exp(vec<float> x) {
  typedef Vec<float>::bits bits;
  constexpr float kLow = -87.3365f, kHigh = 88.72283f;  // below: flushed to 0; above: infinity
  const bits tiny = x < kLow, huge = x > kHigh;
  const vec<float> clamped = tiny ? splat<float>(kLow) : (huge ? splat<float>(kHigh) : x);
  const vec<float> shift = splat<float>(0x1.8p23f);
  const vec<float> shifted = clamped * 1.44269504f + shift;  // its low bits are round(x / ln 2)
  const vec<float> n = shifted - shift;
  vec<float> r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vec<float> p = splat<float>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // Two steps of 2^(n/2), since 2^128 is not a float though exp(88.7) is.
  const bits exponent = (bits)shifted - (bits)shift, half = exponent >> 1;
  const vec<float> scaled = p * (vec<float>)((half + 127) << 23) * (vec<float>)((exponent - half + 127) << 23);
  return tiny ? vec<float>{} : (huge ? splat<float>(__builtin_inff()) : scaled);
}

inline vec<double> exp(vec<double> x) {
  typedef Vec<double>::bits bits;
  constexpr double kLow = -708.396, kHigh = 709.782712893384;
  const bits tiny = x < kLow, huge = x > kHigh;
  const vec<double> clamped = tiny ? splat<double>(kLow) : (huge ? splat<double>(kHigh) : x);
  const vec<double> shift = splat<double>(0x1.8p52);
  const vec<double> shifted = clamped * 1.4426950408889634 + shift;
  const vec<double> n = shifted - shift;
  vec<double> r = clamped - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  // Taylor to the 13th power: the remainder at ln 2 / 2 is below 2^-57.
  vec<double> p = splat<double>(1.0 / 6227020800.0);
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  const bits exponent = (bits)shifted - (bits)shift, half = exponent >> 1;
  const vec<double> scaled = p * (vec<double>)((half + 1023) << 52) * (vec<double>)((exponent - half + 1023) << 52);
  return tiny ? vec<double>{} : (huge ? splat<double>(__builtin_inf()) : scaled);
}

// exp for x <= 0 (or NaN), as a softmax needs it. No overflow to guard; below the clamp n + bias is 0, so that the
// scale made of it is 0.0 and the underflow costs nothing. The polynomials 1 + r q(r) are minimax in the relative
// error (Remez; 2.6e-9 and 1.8e-17) and exact at 0. One-part ln 2: the product is fused, and n is small where p is not.
inline vec<float> exp_nonpositive(vec<float> x) {
  typedef Vec<float>::bits bits;
  const vec<float> clamped = at_least<float>(-88.0f, x);
  constexpr float kShift = 0x1.8p23f + 127;  // leaves n + 127 in the low bits
  const vec<float> shifted = clamped * 1.44269504f + kShift;
  const vec<float> n = shifted - kShift;
  const vec<float> r = clamped - n * 0.693147180559945f;
  vec<float> q = splat<float>(1.4061421641350073619e-3f);
  q = q * r + 8.3790590339829593695e-3f;
  q = q * r + 4.1664773331043043381e-2f;
  q = q * r + 1.6666364808741228085e-1f;
  q = q * r + 5.0000004357406567638e-1f;
  q = q * r + 1.0000000497968430908f;
  q = q * r + 1.0f;
  return q * (vec<float>)((bits)shifted << 23);
}

inline vec<double> exp_nonpositive(vec<double> x) {
  typedef Vec<double>::bits bits;
  const vec<double> clamped = at_least<double>(-709.0, x);
  constexpr double kShift = 0x1.8p52 + 1023;
  const vec<double> shifted = clamped * 1.4426950408889634 + kShift;
  const vec<double> n = shifted - kShift;
  vec<double> r = clamped - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  vec<double> q = splat<double>(2.2981301825604887087e-8);
  q = q * r + 2.7626365563687913044e-7;
  q = q * r + 2.7564262004550394845e-6;
  q = q * r + 2.4801504345370258507e-5;
  q = q * r + 1.9841261474479731536e-4;
  q = q * r + 1.3888888932471260598e-3;
  q = q * r + 8.3333333377287351624e-3;
  q = q * r + 4.1666666666573263126e-2;
  q = q * r + 1.6666666666657264606e-1;
  q = q * r + 5.0000000000000056005e-1;
  q = q * r + 1.0000000000000005616;
  q = q * r + 1.0;
  return q * (vec<double>)((bits)shifted << 52);
}

inline float exp(float x) { return exp(splat<float>(x))[0]; }
inline double exp(double x) { return exp(splat<double>(x))[0]; }

// tanh(x) = (1 - e) / (1 + e) with e = exp(-2|x|); near 0 that cancels, so a series takes over.
template <typename C> inline vec<C> tanh(vec<C> x) {
  const vec<C> size = x < 0 ? -x : x;
  const vec<C> e = exp(size * C(-2));
  const vec<C> large = (C(1) - e) / (C(1) + e);
  const vec<C> s = x * x;
  // Continued fraction of tanh, deep enough for |x| < 1/4 in double.
  const vec<C> small = size / (C(1) + s / (C(3) + s / (C(5) + s / (C(7) + s / (C(9) + s / C(11))))));
  const vec<C> y = size < C(0.25) ? small : large;
  return x < 0 ? -y : y;
}

}  // namespace fastalign::FASTALIGN_LEVEL
