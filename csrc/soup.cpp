// soup_span: blocks of every input widened into the cache, summed in registers, narrowed once; or, for few outputs of
// inputs' own type, straight from their bytes. Built once per level.
#include "soup.h"

#include "simd.h"

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
  static constexpr int kTop = kInfinity ? 0x7c : 0x7f;   // the least magnitude that is no number
  static constexpr int kMost = kInfinity ? 0x7c : 0x7e;  // what becomes of numbers beyond the range

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

constexpr int64_t kStep = 4 * lanes<float>;  // elements that are summed at once
constexpr int64_t kBuffer = 1 << 13;         // wide elements of all inputs together
constexpr int kDirect = 2;                   // more outputs than these, and widening the inputs once is worth a buffer

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

// count elements of every input, then zeros up to the end of the last step: what stands there is summed too.
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

// The sum of one step's elements of one output, left in `sums`.
template <typename C> static inline void sum_step(C* sums, const C* const* wide, int inputs, const C* weights, int64_t j) {
  constexpr int V = int(kStep / lanes<C>);
  vec<C> total[V];
  for (int v = 0; v < V; ++v) total[v] = weights[0] * load<C>(wide[0] + j + v * lanes<C>);
  for (int i = 1; i < inputs; ++i) {
    const C weight = weights[i];
    const C* x = wide[i] + j;
    for (int v = 0; v < V; ++v) total[v] += weight * load<C>(x + v * lanes<C>);
  }
  for (int v = 0; v < V; ++v) store<C>(sums + v * lanes<C>, total[v]);
}

template <typename S> struct TypeOf;
template <> struct TypeOf<double> { static constexpr SoupType type = SoupType::float64; };
template <> struct TypeOf<float> { static constexpr SoupType type = SoupType::float32; };
template <> struct TypeOf<bfloat16> { static constexpr SoupType type = SoupType::bfloat16; };
template <> struct TypeOf<float16> { static constexpr SoupType type = SoupType::float16; };
template <> struct TypeOf<float8_e4m3fn> { static constexpr SoupType type = SoupType::float8_e4m3fn; };
template <> struct TypeOf<float8_e5m2> { static constexpr SoupType type = SoupType::float8_e5m2; };

// One output of inputs of its own type, whole steps of them, without the buffer: the same sums in the same order.
// Pairs of vectors may do here: a NaN that comes of bfloat16 numbers and finite weights has its low bits clear.
template <typename S>
static void direct(S* out, const S* const* ins, int inputs, const typename Storage<S>::C* weights, int64_t n) {
  typedef typename Storage<S>::C C;
  constexpr int64_t L = lanes<C>;
  constexpr int V = 4;
  for (int64_t j = 0; j < n; j += V * L) {
    vec<C> total[V], x[V];
    for (int v = 0; v < V; v += 2) Storage<S>::load_pair(ins[0] + j + v * L, x[v], x[v + 1]);
    for (int v = 0; v < V; ++v) total[v] = weights[0] * x[v];
    for (int i = 1; i < inputs; ++i) {
      for (int v = 0; v < V; v += 2) Storage<S>::load_pair(ins[i] + j + v * L, x[v], x[v + 1]);
      for (int v = 0; v < V; ++v) total[v] += weights[i] * x[v];
    }
    for (int v = 0; v < V; v += 2) Storage<S>::store_pair(out + j + v * L, total[v], total[v + 1]);
  }
}

template <typename S, typename C>
static void span(void* const* outs, int outputs, const void* const* ins, const SoupType* in_types, int inputs,
                 const double* weights, int64_t n) {
  alignas(64) C buffer[kBuffer], sums[kStep], row[kSoupInputs];
  const int64_t most = kBuffer / inputs / kStep * kStep;  // at least one step of 128 inputs: kStep is 64 or less
  const C* wide[kSoupInputs];
  int64_t done = 0;
  if constexpr (sizeof(C) == sizeof(typename Storage<S>::C)) {
    bool alike = outputs <= kDirect;
    for (int i = 0; i < inputs; ++i) alike &= in_types[i] == TypeOf<S>::type;
    if (alike) {
      done = n / kStep * kStep;
      const S* from[kSoupInputs];
      for (int i = 0; i < inputs; ++i) from[i] = static_cast<const S*>(ins[i]);
      for (int k = 0; k < outputs; ++k) {
        for (int i = 0; i < inputs; ++i) row[i] = C(weights[int64_t(k) * inputs + i]);
        direct<S>(static_cast<S*>(outs[k]), from, inputs, row, done);
      }
    }
  }
  for (int64_t first = done; first < n; first += most) {
    const int64_t count = n - first < most ? n - first : most;
    widen_blocks<C>(buffer, most, wide, ins, in_types, inputs, first, count);
    for (int k = 0; k < outputs; ++k) {
      S* out = static_cast<S*>(outs[k]) + first;
      for (int i = 0; i < inputs; ++i) row[i] = C(weights[int64_t(k) * inputs + i]);
      for (int64_t j = 0; j < count; j += kStep) {
        sum_step<C>(sums, wide, inputs, row, j);
        narrow_vectors<S, C>(out + j, sums, count - j < kStep ? count - j : kStep);
      }
    }
  }
}

template <typename C>
static void dots_span(double* dots, const void* const* ins, const SoupType* in_types, int inputs, int64_t n) {
  alignas(64) C buffer[kBuffer];
  const int64_t most = kBuffer / inputs / kStep * kStep;
  const C* wide[kSoupInputs];
  constexpr int V = int(kStep / lanes<C>);
  for (int64_t first = 0; first < n; first += most) {
    const int64_t count = n - first < most ? n - first : most;
    widen_blocks<C>(buffer, most, wide, ins, in_types, inputs, first, count);
    for (int a = 0; a < inputs; ++a) {
      for (int b = a; b < inputs; ++b) {
        vec<C> total[V] = {};
        for (int64_t j = 0; j < count; j += kStep) {
          for (int v = 0; v < V; ++v) total[v] += load<C>(wide[a] + j + v * lanes<C>) * load<C>(wide[b] + j + v * lanes<C>);
        }
        double sum = 0;
        for (int v = 0; v < V; ++v) {
          for (int l = 0; l < lanes<C>; ++l) sum += double(total[v][l]);
        }
        dots[a * inputs + b] += sum;
        if (a != b) dots[b * inputs + a] += sum;
      }
    }
  }
}

static bool any_wide(const SoupType* in_types, int inputs) {
  for (int i = 0; i < inputs; ++i) {
    if (in_types[i] == SoupType::float64) return true;
  }
  return false;
}

void soup_dots_span(double* dots, const void* const* ins, const SoupType* in_types, int inputs, int64_t n) {
  any_wide(in_types, inputs) ? dots_span<double>(dots, ins, in_types, inputs, n)
                             : dots_span<float>(dots, ins, in_types, inputs, n);
}

void soup_span(void* const* outs, SoupType out_type, int outputs, const void* const* ins, const SoupType* in_types,
               int inputs, const double* weights, int64_t n) {
  const bool wide = any_wide(in_types, inputs);  // a float64 output alone has a case of its own
#define FASTALIGN_SPAN(S)                                                                          \
  wide ? span<S, double>(outs, outputs, ins, in_types, inputs, weights, n)                         \
       : span<S, float>(outs, outputs, ins, in_types, inputs, weights, n);                         \
  break
  switch (out_type) {
    case SoupType::float64: span<double, double>(outs, outputs, ins, in_types, inputs, weights, n); break;
    case SoupType::float32: FASTALIGN_SPAN(float);
    case SoupType::bfloat16: FASTALIGN_SPAN(bfloat16);
    case SoupType::float16: FASTALIGN_SPAN(float16);
    case SoupType::float8_e4m3fn: FASTALIGN_SPAN(float8_e4m3fn);
    case SoupType::float8_e5m2: FASTALIGN_SPAN(float8_e5m2);
  }
#undef FASTALIGN_SPAN
}

}  // namespace fastalign::FASTALIGN_LEVEL
